//! `doctor`: what keeps builds from working.

use std::path::PathBuf;

use secrecy::SecretString;

use super::output::Colour;
use super::{Error, Exit, Format, Output, harmless};
use crate::config::Config;
use crate::doctor::{Finding, Node, Report, Verdict, examine_cluster, examine_node};
use crate::environment;

/// The arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Look at the machine that this runs on, as a node for builds, instead of at the service's configuration
    #[arg(long, conflicts_with = "management_token_file")]
    node: bool,
    /// File with a management token, to look at ACL policies and nodes, which the service's own token may not
    #[arg(long, value_name = "FILE")]
    management_token_file: Option<PathBuf>,
}

/// Looks, and tells what it found. It ends with 1 where something keeps builds from working.
pub(super) async fn run(args: Args, output: &mut Output) -> Result<Exit, Error> {
    let report = if args.node {
        let socket = environment::process("NOMAD_BUILD_ENGINE_SOCKET");
        examine_node(&Node { engine_socket: socket.unwrap_or_else(|| "/var/run/docker.sock".to_owned()) })
            .await
    } else {
        // The service makes its audit log, and owns it then.
        let variable = |name: &str| environment::process(name).filter(|_| name != "NOMAD_BUILD_AUDIT_FILE");
        let config = Config::read(&variable)
            .map_err(|source| Error::new(Exit::Usage, "reading the configuration").caused_by(source))?;
        let management = args.management_token_file.map(token).transpose()?;
        let examined = examine_cluster(&config, management).await;
        examined.map_err(|source| Error::new(Exit::Failure, "preparing to ask Nomad").caused_by(source))?
    };
    match output.format() {
        Format::Json => {
            let text = serde_json::to_string(&report);
            let text = text.map_err(|source| {
                Error::new(Exit::Failure, "writing down what was found").caused_by(source)
            })?;
            output.line(&text)?;
        }
        Format::Text => output.write(&table(&report, output))?,
    }
    Ok(if report.is_bad() { Exit::Failure } else { Exit::Success })
}

fn token(file: PathBuf) -> Result<SecretString, Error> {
    let doing = format!("reading the management token in {}", file.display());
    let text =
        std::fs::read_to_string(file).map_err(|source| Error::new(Exit::Usage, doing).caused_by(source))?;
    Ok(text.trim().into())
}

fn table(report: &Report, output: &Output) -> String {
    let paint = output.paint_stdout();
    let mut text = String::new();
    for Finding { check, verdict, message, remedy } in &report.0 {
        let (word, colour) = match verdict {
            Verdict::Good => ("good", Colour::Green),
            Verdict::Warning => ("warning", Colour::Yellow),
            Verdict::Bad => ("bad", Colour::Red),
            Verdict::Unknown => ("unknown", Colour::Dim),
        };
        let word = paint.text(colour, &format!("{word:<8}"));
        text.push_str(&format!("{word} {check:<10} {}\n", harmless::text(message)));
        if let Some(remedy) = remedy {
            text.push_str(&format!("{:20}-> {}\n", "", harmless::text(remedy)));
        }
    }
    text
}
