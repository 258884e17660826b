# For every job of the builds' namespace, by its workload identity. Nomad has no policy for "the job's own", so one covers them all.
# nomad acl policy apply -namespace builds nomad-build-runner runner.hcl
namespace "builds" {
  variables {
    path "nomad-build/claims/*" {
      capabilities = ["read", "write"]
    }
    path "nomad-build/outcomes/*" {
      capabilities = ["read", "write"]
    }
    path "nomad-build/sweeps/*" {
      capabilities = ["write"]
    }
    path "nomad/jobs/nb-*" {
      capabilities = ["destroy"]
    }
  }
}
