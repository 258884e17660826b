//! The same task shape as one Nomad job, written by hand: shell scripts, git and the docker program.

use serde_json::{Value, json};

use crate::stack::Stack;

const BUILD: &str = r#"cd "$NOMAD_ALLOC_DIR"
git clone --quiet --depth 1 "$REPOSITORY" checkout
docker build --quiet --tag "$IMAGE" checkout
"#;

const TEST: &str = r#"docker run --rm "$IMAGE" /bin/sh -c 'test -e /built'
touch "$NOMAD_ALLOC_DIR/tested"
"#;

const PUBLISH: &str = r#"until [ -e "$NOMAD_ALLOC_DIR/tested" ]; do sleep 0.01; done
docker push --quiet "$IMAGE"
"#;

const FINISH: &str = r#"rm -rf "$NOMAD_ALLOC_DIR/checkout"
docker rmi "$IMAGE"
"#;

/// What a person does without Nomad, with the same programs.
pub(crate) const BY_HAND: &str = r#"git clone --quiet --depth 1 "$REPOSITORY" "$FOLDER"
docker build --quiet --tag "$IMAGE" "$FOLDER"
docker run --rm "$IMAGE" /bin/sh -c 'test -e /built'
docker push --quiet "$IMAGE"
"#;

/// A job under this ID that publishes an image of this name.
pub(crate) fn job(stack: &Stack, id: &str, image: &str) -> Value {
    let task = |name: &str, hook: Option<&str>, script: &str| {
        json!({
            "Name": name,
            "Driver": "raw_exec",
            "Lifecycle": hook.map(|hook| json!({"Hook": hook, "Sidecar": false})),
            "Config": {"command": "/bin/sh", "args": ["-eu", "-c", script]},
            "Env": {"REPOSITORY": stack.repository_url(), "IMAGE": image, "DOCKER_BUILDKIT": "1"},
            "Resources": {"CPU": 100, "MemoryMB": 64},
        })
    };
    json!({
        "ID": id, "Name": id, "Type": "batch", "Datacenters": ["*"],
        "TaskGroups": [{
            "Name": "job",
            "Count": 1,
            "RestartPolicy": {"Attempts": 0, "Interval": 5_000_000_000_u64, "Delay": 0, "Mode": "fail"},
            "ReschedulePolicy": {"Attempts": 0, "Unlimited": false},
            "Tasks": [
                task("build", Some("prestart"), BUILD),
                task("test", None, TEST),
                task("publish", None, PUBLISH),
                task("finish", Some("poststop"), FINISH),
            ],
        }],
    })
}
