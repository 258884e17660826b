# An image registry without authentication, for one machine or one trusted network.
#
#   nomad job run -var data_dir=/srv/registry nomad-jobs/registry.nomad.hcl

variable "driver" {
  type        = string
  default     = "docker"
  description = "docker (an image) or raw_exec (a registry program of the node)"

  validation {
    condition     = contains(["docker", "raw_exec"], var.driver)
    error_message = "The driver has to be docker or raw_exec."
  }
}

variable "image" {
  type        = string
  default     = "docker.io/library/registry:2"
  description = "the registry's image, for the docker driver"
}

variable "command" {
  type        = string
  default     = "docker-registry"
  description = "the registry's program, for the raw_exec driver"
}

variable "data_dir" {
  type        = string
  default     = "/var/lib/nomad-build-registry"
  description = "where the node keeps the images; the docker driver needs volumes { enabled = true } to mount it"
}

variable "listen" {
  type        = string
  default     = "0.0.0.0"
  description = "the address the registry listens on"
}

variable "port" {
  type        = number
  default     = 5000
  description = "the port the registry listens on"
}

job "registry" {
  type = "service"

  group "registry" {
    network {
      port "http" {
        static = var.port
      }
    }

    service {
      name     = "registry"
      port     = "http"
      provider = "nomad"

      check {
        type     = "http"
        path     = "/v2/"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "registry" {
      driver       = var.driver
      kill_timeout = "10s"

      dynamic "config" {
        for_each = var.driver == "docker" ? [1] : []
        content {
          image        = var.image
          network_mode = "host"
          args         = ["serve", "$${NOMAD_TASK_DIR}/config.yml"]
          volumes      = ["${var.data_dir}:${var.data_dir}"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "raw_exec" ? [1] : []
        content {
          command = var.command
          args    = ["serve", "$${NOMAD_TASK_DIR}/config.yml"]
        }
      }

      template {
        destination = "local/config.yml"
        data        = <<-YAML
          version: 0.1
          log:
            level: warn
            accesslog:
              disabled: true
          storage:
            delete:
              enabled: true
            cache:
              blobdescriptor: inmemory
            filesystem:
              rootdirectory: "${var.data_dir}"
          http:
            addr: "${var.listen}:${var.port}"
            headers:
              X-Content-Type-Options: [nosniff]
        YAML
      }

      # A Go program does not see the limit below: it collects before it is there, instead of being ended.
      env {
        GOMEMLIMIT = "192MiB"
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }
  }
}
