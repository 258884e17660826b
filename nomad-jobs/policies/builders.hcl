# For developers and CI: to build, to follow, to kill, with the credentials of one team.
# nomad acl policy apply builders builders.hcl
namespace "builds" {
  capabilities = ["read-job", "read-logs", "dispatch-job"]

  variables {
    path "creds/acme/*" {
      capabilities = ["read"]
    }
  }
}
