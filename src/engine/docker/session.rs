//! What BuildKit asks its client for while it builds: files, credentials of registries, secrets, and what agents sign.
//!
//! The engine takes over a connection that was opened to it, and speaks as the client of the services here: gRPC, of which the
//! messages are BuildKit's.
//!
//! Invariant: a secret is given to who asks for it by its ID, over the engine's socket, and is written nowhere.

use std::collections::{BTreeMap, HashMap};

use bollard_buildkit_proto::health::health_check_response::ServingStatus;
use bollard_buildkit_proto::health::health_server::{Health, HealthServer};
use bollard_buildkit_proto::health::{
    HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse,
};
use bollard_buildkit_proto::moby::buildkit::secrets::v1::secrets_server::{Secrets, SecretsServer};
use bollard_buildkit_proto::moby::buildkit::secrets::v1::{GetSecretRequest, GetSecretResponse};
use bollard_buildkit_proto::moby::filesync::v1::auth_server::{Auth, AuthServer};
use bollard_buildkit_proto::moby::filesync::v1::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
    GetTokenAuthorityResponse, VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse,
};
use bollard_buildkit_proto::moby::sshforward::v1::ssh_server::SshServer;
use futures_util::stream::BoxStream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use reqwest::header::{CONNECTION, UPGRADE};
use reqwest::{Client, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;
use tonic::{Request, Response, Status, async_trait};

use super::super::{BuildRequest, RegistryAuth};
use super::agents::Agents;
use super::files::{self, Files};

/// What may be asked for here; BuildKit asks for nothing else.
const METHODS: [&str; 5] = [
    files::METHOD,
    "/moby.filesync.v1.Auth/Credentials",
    "/moby.buildkit.secrets.v1.Secrets/GetSecret",
    "/moby.sshforward.v1.SSH/CheckAgent",
    "/moby.sshforward.v1.SSH/ForwardAgent",
];

/// The most bytes of a request's headers: an ignore file's patterns come with the request for the context.
const HEADERS: u32 = 16 << 20;

/// Why no session could be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unopened {
    /// The engine did not answer.
    #[error("the engine did not open a build's session")]
    Unreachable(#[from] reqwest::Error),
    /// It answered something else.
    #[error("the engine refused to open a build's session with status {0}")]
    Refused(StatusCode),
}

/// An open session. Dropped, it is closed, and a build that is bound to it fails.
pub(super) struct Session {
    id: String,
    _answering: AbortOnDropHandle<()>,
}

impl Session {
    /// Opens one that answers with what a build was given.
    pub(super) async fn open(
        engine: &Client,
        base: &str,
        request: &BuildRequest,
        files: Files,
    ) -> Result<Self, Unopened> {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let mut opening = engine
            .post(format!("{base}/session"))
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "h2c")
            .header("X-Docker-Expose-Session-Uuid", &id)
            // Builds with the same key have what is sent in common, and a file of the same time and size is taken for the same.
            .header("X-Docker-Expose-Session-Sharedkey", &id);
        for method in METHODS {
            opening = opening.header("X-Docker-Expose-Session-Grpc-Method", method);
        }
        let opened = opening.send().await?;
        if opened.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Unopened::Refused(opened.status()));
        }
        let connection = TokioIo::new(opened.upgrade().await?);
        let routes = Routes::new(HealthServer::new(Alive))
            .add_service(files)
            .add_service(AuthServer::new(Logins::of(request)))
            .add_service(SecretsServer::new(Given(request.secrets.clone())))
            .add_service(SshServer::new(Agents(request.agents.clone())));
        let answering = async move {
            let mut server = auto::Builder::new(TokioExecutor::new()).http2_only();
            server.http2().max_header_list_size(HEADERS);
            // It ends with the build, however that ends.
            if let Err(error) = server.serve_connection(connection, TowerToHyperService::new(routes)).await {
                tracing::debug!(error, "a build's session has ended");
            }
        };
        #[expect(clippy::disallowed_methods, reason = "its handle ends it with the session")]
        let answering = AbortOnDropHandle::new(tokio::spawn(answering));
        Ok(Self { id, _answering: answering })
    }

    /// The name by which a build is bound to it.
    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

/// The secrets of a build, by ID.
struct Given(BTreeMap<String, SecretString>);

#[async_trait]
impl Secrets for Given {
    async fn get_secret(
        &self,
        request: Request<GetSecretRequest>,
    ) -> Result<Response<GetSecretResponse>, Status> {
        let id = &request.get_ref().id;
        let secret = self.0.get(id).ok_or_else(|| Status::not_found(format!("no secret {id:?}")))?;
        Ok(Response::new(GetSecretResponse { data: secret.expose_secret().as_bytes().to_vec() }))
    }
}

/// Users and passwords of registries.
struct Logins(HashMap<String, (String, SecretString)>);

impl Logins {
    fn of(request: &BuildRequest) -> Self {
        let login = |auth: &RegistryAuth| {
            (hub_or(&auth.host).to_owned(), (auth.username.clone(), auth.password.clone()))
        };
        Self(request.registry_auth.iter().map(login).collect())
    }
}

/// The name by which BuildKit asks for a registry's credentials: for Docker Hub, that of its API's host.
fn hub_or(host: &str) -> &str {
    match host {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "registry-1.docker.io",
        host => host,
    }
}

/// Without the further methods, BuildKit logs in by itself.
#[async_trait]
impl Auth for Logins {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        let login = self.0.get(hub_or(&request.get_ref().host));
        let login = login.map(|(username, password)| CredentialsResponse {
            username: username.clone(),
            secret: password.expose_secret().to_owned(),
        });
        Ok(Response::new(login.unwrap_or_default()))
    }

    async fn fetch_token(
        &self,
        _: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by who builds"))
    }

    async fn get_token_authority(
        &self,
        _: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("there is no token authority"))
    }

    async fn verify_token_authority(
        &self,
        _: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("there is no token authority"))
    }
}

/// BuildKit closes a session that does not say that it is alive.
struct Alive;

fn serving() -> HealthCheckResponse {
    HealthCheckResponse { status: ServingStatus::Serving.into() }
}

#[async_trait]
impl Health for Alive {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(serving()))
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        Ok(Response::new(HealthListResponse { statuses: HashMap::from([(String::new(), serving())]) }))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("ask again instead"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_hub_is_known_by_the_host_of_its_api() {
        for (host, expected) in [
            ("docker.io", "registry-1.docker.io"),
            ("index.docker.io", "registry-1.docker.io"),
            ("ghcr.io", "ghcr.io"),
            ("127.0.0.1:5000", "127.0.0.1:5000"),
        ] {
            assert_eq!(hub_or(host), expected);
        }
    }
}
