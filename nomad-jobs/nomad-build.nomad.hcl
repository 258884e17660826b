# The service itself, in any number of replicas: it keeps nothing that it cannot rebuild from Nomad.
#
#   nomad job run -var image=registry.example.com/nomad-build:1.0.0 nomad-jobs/nomad-build.nomad.hcl
#
# With ACLs on, give the job its policy before it runs; its workload identity carries it:
#
#   nomad acl policy apply -namespace default -job nomad-build nomad-build nomad-jobs/policies/service.hcl

variable "image" {
  type        = string
  description = "the service's image, built from this repository's Dockerfile"
}

variable "replicas" {
  type        = number
  default     = 1
  description = "how many replicas answer: all serve, one counts the jobs"
}

variable "port" {
  type        = number
  default     = 8080
  description = "the port of the API on every node that runs a replica"
}

variable "nomad_address" {
  type        = string
  default     = ""
  description = "Nomad's HTTP API; empty for that of the node a replica is placed on"
}

variable "builds_namespaces" {
  type        = list(string)
  default     = ["default"]
  description = "the namespaces that builds run in; the first is that of a submission that names none"
}

variable "template" {
  type        = string
  default     = "docker"
  description = "the job template builds run by: docker (the runner is the image above) or raw_exec"
}

variable "runner" {
  type        = string
  default     = "/usr/local/bin/nomad-build"
  description = "how raw_exec builds get the runner: a path on the nodes, or http://... where they reach this service"
}

variable "insecure_registries" {
  type        = list(string)
  default     = []
  description = "registries (HOST:PORT) that are spoken to by plain HTTP"
}

variable "archive" {
  type        = string
  default     = ""
  description = "where ended jobs are archived (s3://BUCKET/PREFIX, or file:///DIRECTORY shared by all nodes); empty for nowhere"
}

variable "archive_credentials" {
  type        = string
  default     = ""
  description = "a Nomad Variable with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and their like; empty for a role of the node"
}

variable "open" {
  type        = bool
  default     = false
  description = "whether anybody who reaches the service is served where Nomad has no ACLs"
}

variable "settings" {
  type        = map(string)
  default     = {}
  description = "further variables of the service, as the README's Configuration has them"
}

variable "log_level" {
  type        = string
  default     = "info"
  description = "what the service logs: error, warn, info, debug or trace"
}

job "nomad-build" {
  type = "service"

  group "service" {
    count = var.replicas

    # The port is the node's, so no two replicas share one.
    constraint {
      operator = "distinct_hosts"
      value    = "true"
    }

    update {
      max_parallel     = 1
      health_check     = "checks"
      min_healthy_time = "5s"
      healthy_deadline = "2m"
      auto_revert      = true
    }

    network {
      port "http" {
        static = var.port
      }
    }

    service {
      name     = "nomad-build"
      port     = "http"
      provider = "nomad"

      # Alive: a replica that cannot even say this is restarted.
      check {
        name     = "health"
        type     = "http"
        path     = "/health"
        interval = "10s"
        timeout  = "2s"

        check_restart {
          limit = 3
          grace = "30s"
        }
      }

      # Ready: Nomad answers and the watcher is current. A replica is not restarted for Nomad's silence.
      check {
        name     = "ready"
        type     = "http"
        path     = "/ready"
        interval = "5s"
        timeout  = "3s"
      }
    }

    task "service" {
      driver       = "docker"
      kill_timeout = "20s"

      config {
        image        = var.image
        network_mode = "host"
        args         = ["serve"]
      }

      # NOMAD_TOKEN: the workload's own identity.
      identity {
        env = true
      }

      env = merge({
        NOMAD_ADDR                      = var.nomad_address == "" ? "http://$${attr.unique.network.ip-address}:4646" : var.nomad_address
        NOMAD_BUILD_LISTEN              = "$${NOMAD_ADDR_http}"
        NOMAD_BUILD_OPEN                = var.open ? "true" : "false"
        NOMAD_BUILD_NAMESPACES          = join(",", var.builds_namespaces)
        NOMAD_BUILD_TEMPLATE            = var.template
        NOMAD_BUILD_RUNNER              = var.template == "docker" ? var.image : var.runner
        NOMAD_BUILD_INSECURE_REGISTRIES = join(",", var.insecure_registries)
        NOMAD_BUILD_ARCHIVE             = var.archive
        NOMAD_BUILD_LOG                 = var.log_level
      }, var.settings)

      # The items of the Variable, as they are; none without one.
      dynamic "template" {
        for_each = var.archive_credentials == "" ? [] : [var.archive_credentials]
        content {
          data        = "{{ with nomadVar \"${template.value}\" }}{{ range .Tuples }}{{ .K }}={{ .V | toJSON }}\n{{ end }}{{ end }}"
          destination = "$${NOMAD_SECRETS_DIR}/archive.env"
          env         = true
        }
      }

      resources {
        cpu        = 300
        memory     = 512
        memory_max = 1024
      }
    }
  }
}
