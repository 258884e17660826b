//! What the steps of a build say to the agents that hold their keys, and are answered.
//!
//! Invariant: a step asks which keys there are, and has something signed. An agent does more than that for who asks it, such as
//! loading a library (CVE-2023-38408): none of it is passed on.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use bollard_buildkit_proto::moby::sshforward::v1::ssh_server::Ssh;
use bollard_buildkit_proto::moby::sshforward::v1::{BytesMessage, CheckAgentRequest, CheckAgentResponse};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream};
use futures_util::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use tokio::net::UnixStream;
use tokio_util::codec::{Framed, FramedRead, LengthDelimitedCodec};
use tokio_util::io::StreamReader;
use tonic::{Request, Response, Status, Streaming, async_trait};

/// The metadata by which BuildKit names the key of a step, and the name of one that does not (its `sshforward` package).
const ID: &str = "buildkit.ssh.id";
const DEFAULT: &str = "default";

/// Messages of the agent protocol (draft-miller-ssh-agent, 6.1), and an agent's answer to what it does not do.
const REQUEST_IDENTITIES: u8 = 11;
const SIGN_REQUEST: u8 = 13;
const FAILURE: &[u8] = &[5];

/// The most bytes of a message, as OpenSSH's agent has it.
const LARGEST: usize = 256 << 10;

/// Sockets of agents, by ID.
pub(super) struct Agents(pub(super) BTreeMap<String, PathBuf>);

impl Agents {
    fn socket(&self, id: &str) -> Result<&Path, Status> {
        let id = if id.is_empty() { DEFAULT } else { id };
        let socket = self.0.get(id).map(PathBuf::as_path);
        socket.ok_or_else(|| Status::not_found(format!("the submission's ssh names no key {id:?}")))
    }
}

#[async_trait]
impl Ssh for Agents {
    async fn check_agent(
        &self,
        request: Request<CheckAgentRequest>,
    ) -> Result<Response<CheckAgentResponse>, Status> {
        self.socket(&request.get_ref().id).map(|_| Response::new(CheckAgentResponse {}))
    }

    type ForwardAgentStream = BoxStream<'static, Result<BytesMessage, Status>>;

    async fn forward_agent(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let id = request.metadata().get(ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
        let agent = UnixStream::connect(self.socket(id)?).await;
        let agent =
            agent.map_err(|error| Status::unavailable(format!("the agent of key {id:?}: {error}")))?;
        let pieces = request.into_inner().map_ok(|message| Bytes::from(message.data));
        let asked = FramedRead::new(StreamReader::new(pieces.map_err(io::Error::other)), messages());
        let answers =
            stream::try_unfold((asked, Framed::new(agent, messages())), |(mut asked, mut agent)| async {
                let Some(asks) = asked.try_next().await? else { return Ok(None) };
                let answer = if matches!(asks.first(), Some(&(REQUEST_IDENTITIES | SIGN_REQUEST))) {
                    agent.send(asks.freeze()).await?;
                    agent.try_next().await?.ok_or(io::ErrorKind::UnexpectedEof)?
                } else {
                    BytesMut::from(FAILURE)
                };
                Ok(Some((written(&answer)?, (asked, agent))))
            });
        let failed =
            |error: io::Error| Status::internal(format!("the conversation with an agent broke: {error}"));
        Ok(Response::new(answers.map_err(failed).boxed()))
    }
}

fn messages() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder().max_frame_length(LARGEST).new_codec()
}

fn written(answer: &[u8]) -> io::Result<BytesMessage> {
    let length = u32::try_from(answer.len()).map_err(io::Error::other)?;
    Ok(BytesMessage { data: [&length.to_be_bytes(), answer].concat() })
}
