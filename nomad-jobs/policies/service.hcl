# What the service needs, and no more; for its token, or with -namespace and -job for its workload identity.
# nomad acl policy apply nomad-build service.hcl
namespace "builds" {
  capabilities = ["list-jobs", "read-job", "submit-job", "read-logs"]

  variables {
    path "nomad-build/*" {
      capabilities = ["list", "read", "write", "destroy"]
    }
    path "nomad/jobs/nb-*" {
      capabilities = ["list", "write", "destroy"]
    }
  }
}
