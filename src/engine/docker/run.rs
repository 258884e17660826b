//! A container, from its creation to its removal.

use bollard::container::LogOutput;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, InspectContainerOptions,
    RemoveContainerOptionsBuilder, StartContainerOptions, WaitContainerOptions,
};
use futures_util::StreamExt as _;
use tokio::sync::mpsc::Sender;

use super::super::{EngineError, Exit, Output, RunCommand, RunRequest, Stream};
use super::DockerEngine;

impl DockerEngine {
    pub(super) async fn run_container(
        &self,
        request: &RunRequest,
        output: &Sender<Output>,
    ) -> Result<Exit, EngineError> {
        let id = self.create(request).await?;
        let ended = self.run_created(&id, output).await;
        let removed = self.remove_container(&id).await;
        let exit = ended?;
        removed.map(|()| exit)
    }

    async fn create(&self, request: &RunRequest) -> Result<String, EngineError> {
        const DOING: &str = "creating a container";
        let (docker, body) = (self.docker()?, body(request));
        let options = CreateContainerOptionsBuilder::new().name(&request.name).build();
        let creation = async move { docker.create_container(Some(options), body).await };
        // Cut off in the middle, nobody would know whether it exists.
        match self.creations.spawn(creation).await {
            Ok(created) => Ok(created.map_err(|error| self.without(&request.image, DOING, error))?.id),
            Err(died) => Err(EngineError::Refused { doing: DOING.to_owned(), message: died.to_string() }),
        }
    }

    /// Starts a container and passes on what it says until it ends.
    async fn run_created(&self, id: &str, output: &Sender<Output>) -> Result<Exit, EngineError> {
        let options = AttachContainerOptionsBuilder::new().stream(true).stdout(true).stderr(true).build();
        let docker = self.docker()?;
        // Attached before it starts: nothing it says is missed.
        let attached = docker.attach_container(id, Some(options)).await;
        let mut said = attached.map_err(|error| self.failed("attaching to a container", error))?.output;
        let started = docker.start_container(id, None::<StartContainerOptions>).await;
        started.map_err(|error| self.failed("starting a container", error))?;
        while let Some(chunk) = said.next().await {
            let chunk = chunk.map_err(|error| self.failed("reading a container's output", error))?;
            let (stream, message) = match chunk {
                LogOutput::StdErr { message } => (Stream::Stderr, message),
                LogOutput::StdOut { message } | LogOutput::Console { message } => (Stream::Stdout, message),
                LogOutput::StdIn { .. } => continue,
            };
            // Whoever listened may be gone; the container still runs to its end.
            output.send(Output { stream, bytes: message.to_vec() }).await.ok();
        }
        match docker.wait_container(id, None::<WaitContainerOptions>).next().await {
            // The client library tells every other exit code than 0 as an error.
            None | Some(Ok(_) | Err(DockerError::DockerContainerWaitError { .. })) => {}
            Some(Err(error)) => return Err(self.failed("waiting for a container", error)),
        }
        self.exit(id).await
    }

    async fn exit(&self, id: &str) -> Result<Exit, EngineError> {
        const DOING: &str = "asking how a container ended";
        let inspected = self.docker()?.inspect_container(id, None::<InspectContainerOptions>).await;
        let state = inspected.map_err(|error| self.failed(DOING, error))?.state.unwrap_or_default();
        let unknown = || EngineError::Refused { doing: DOING.to_owned(), message: "no exit code".to_owned() };
        let code = state.exit_code.ok_or_else(unknown)?;
        Ok(Exit { code, out_of_memory: state.oom_killed.unwrap_or(false) })
    }

    pub(super) async fn remove_container(&self, id: &str) -> Result<(), EngineError> {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        match self.docker()?.remove_container(id, Some(options)).await {
            // Gone already, or on its way.
            Err(DockerError::DockerResponseServerError { status_code: 404 | 409, .. }) | Ok(()) => Ok(()),
            Err(error) => Err(self.failed("removing a container", error)),
        }
    }
}

fn body(request: &RunRequest) -> ContainerCreateBody {
    let entrypoint = match &request.command {
        RunCommand::Shell(command) => {
            // A command that begins like an option would be taken for one.
            let end_of_options = command.starts_with(['-', '+']).then_some("--");
            let words = ["/bin/sh", "-c"].into_iter().chain(end_of_options).chain([command.as_str()]);
            Some(words.map(str::to_owned).collect::<Vec<_>>())
        }
        RunCommand::EntryPoint => None,
    };
    ContainerCreateBody {
        image: Some(request.image.clone()),
        // An image's own command would become arguments of the shell.
        cmd: entrypoint.as_ref().map(|_| Vec::new()),
        entrypoint,
        env: Some(request.env.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        labels: Some(request.labels.clone().into_iter().collect()),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        host_config: Some(HostConfig {
            memory: Some(request.memory_bytes),
            // No swap beyond it.
            memory_swap: Some(request.memory_bytes),
            cpu_shares: Some(request.cpu_shares),
            pids_limit: Some(request.pids),
            network_mode: (!request.network).then(|| "none".to_owned()),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            // What Nomad's docker driver gives no task either: packets of any shape.
            cap_drop: Some(vec!["NET_RAW".to_owned()]),
            // What it says is taken while it says it: the engine need not keep it on its disk.
            log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn a_command_is_one_argument_and_a_variable_one_text_whatever_they_say(
            command in "([-+$(){}`;&|'\"\\\\ \n%]|\\PC){0,12}",
            env in proptest::collection::btree_map("[A-Z]{1,4}", "([-+$(){}`;&|'\"\\\\ \n%=]|\\PC){0,12}", 0..3),
        ) {
            let request = RunRequest {
                name: "name".to_owned(),
                image: "sha256:0".to_owned(),
                command: RunCommand::Shell(command.clone()),
                env: env.clone(),
                labels: std::collections::BTreeMap::new(),
                memory_bytes: 1,
                cpu_shares: 1,
                pids: 1,
                network: true,
            };
            let body = body(&request);
            let words = body.entrypoint.unwrap();
            let (last, shell) = words.split_last().unwrap();
            prop_assert_eq!(last, &command);
            prop_assert!(matches!(shell, [sh, c] | [sh, c, _] if sh == "/bin/sh" && c == "-c"));
            // What the shell takes for an option is behind the end of the options.
            prop_assert!(!command.starts_with(['-', '+']) || shell.last().is_some_and(|word| word == "--"));
            prop_assert_eq!(body.cmd, Some(Vec::new()));
            let sent: Vec<_> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
            prop_assert_eq!(body.env, Some(sent));
        }
    }
}
