# A Prometheus that finds every replica of the service in Nomad's own service discovery.
#
#   nomad job run nomad-jobs/prometheus.nomad.hcl

variable "driver" {
  type        = string
  default     = "docker"
  description = "docker (an image) or raw_exec (a Prometheus program of the node)"

  validation {
    condition     = contains(["docker", "raw_exec"], var.driver)
    error_message = "The driver has to be docker or raw_exec."
  }
}

variable "image" {
  type        = string
  default     = "docker.io/prom/prometheus:v3.5.0"
  description = "Prometheus' image, for the docker driver"
}

variable "command" {
  type        = string
  default     = "prometheus"
  description = "Prometheus' program, for the raw_exec driver"
}

variable "service_name" {
  type        = string
  default     = "nomad-build"
  description = "the service to scrape, as nomad-build.nomad.hcl registers it"
}

variable "port" {
  type        = number
  default     = 9090
  description = "the port Prometheus listens on"
}

variable "retention" {
  type        = string
  default     = "15d"
  description = "how long samples are kept"
}

locals {
  args = [
    "--config.file=$${NOMAD_TASK_DIR}/prometheus.yml",
    "--storage.tsdb.path=$${NOMAD_ALLOC_DIR}/data",
    "--storage.tsdb.retention.time=${var.retention}",
    "--web.listen-address=$${NOMAD_ADDR_http}",
  ]
}

job "prometheus" {
  type = "service"

  group "prometheus" {
    # The samples live in the allocation's shared directory, and move with it where they can.
    ephemeral_disk {
      size    = 2000
      sticky  = true
      migrate = true
    }

    network {
      port "http" {
        static = var.port
      }
    }

    service {
      name     = "prometheus"
      port     = "http"
      provider = "nomad"

      check {
        type     = "http"
        path     = "/-/ready"
        interval = "10s"
        timeout  = "2s"
      }
    }

    task "prometheus" {
      driver = var.driver

      dynamic "config" {
        for_each = var.driver == "docker" ? [1] : []
        content {
          image        = var.image
          network_mode = "host"
          args         = local.args
        }
      }

      dynamic "config" {
        for_each = var.driver == "raw_exec" ? [1] : []
        content {
          command = var.command
          args    = local.args
        }
      }

      template {
        destination = "local/prometheus.yml"
        change_mode = "restart"
        data        = <<-YAML
          global:
            scrape_interval: 15s
          scrape_configs:
            - job_name: nomad-build
              file_sd_configs:
                - files: [targets.yml]
        YAML
      }

      # Nomad writes the replicas that there are, and Prometheus reads the file again when it changes.
      template {
        destination = "local/targets.yml"
        change_mode = "noop"
        data        = <<-YAML
          {{- range nomadService "${var.service_name}" }}
          - targets: ["{{ .Address }}:{{ .Port }}"]
          {{- else }}
          []
          {{- end }}
        YAML
      }

      resources {
        cpu    = 200
        memory = 512
      }
    }
  }
}
