# The service, and the runner of builds by the docker driver: one image, one program.
#
#   docker build -t nomad-build .
#
# Every base is an argument. BINARY_STAGE may name an image that holds /usr/local/bin/nomad-build already, which
# is then taken instead of compiling.
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
ARG RUNTIME_IMAGE=docker.io/library/debian:bookworm-slim
ARG BINARY_STAGE=builder

FROM ${RUST_IMAGE} AS builder
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin nomad-build \
    && install -D target/release/nomad-build /usr/local/bin/nomad-build

FROM ${BINARY_STAGE} AS binary

FROM ${RUNTIME_IMAGE}
# An argument, so that a base which has them, or other names for them, can be used too.
ARG RUNTIME_PACKAGES="ca-certificates git git-lfs openssh-client"
RUN if [ -n "${RUNTIME_PACKAGES}" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends ${RUNTIME_PACKAGES} \
        && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=binary /usr/local/bin/nomad-build /usr/local/bin/nomad-build
# Nomad checks /health and /ready itself (nomad-jobs/nomad-build.nomad.hcl).
HEALTHCHECK NONE
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/nomad-build"]
