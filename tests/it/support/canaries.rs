//! Secrets that are looked for afterwards, wherever they could have got to.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use aho_corasick::AhoCorasick;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use tempfile::TempDir;

use super::docker;
use crate::stack::environment;

/// Some secrets, in the forms that they may be written in.
pub(crate) struct Canaries {
    forms: AhoCorasick,
    names: Vec<&'static str>,
}

/// What of a text in base64 is the secret's alone, behind so many other bytes.
fn aligned(secret: &str, before: usize) -> String {
    let encoded = BASE64_STANDARD_NO_PAD.encode([&vec![0; before], secret.as_bytes()].concat());
    encoded[(before * 8).div_ceil(6)..(before + secret.len()) * 8 / 6].to_owned()
}

fn percent(secret: &str) -> String {
    secret.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

impl Canaries {
    /// By their names. Of a secret of several lines, each line that is long enough to be one.
    pub(crate) fn new(secrets: &[(&'static str, &str)]) -> Self {
        let (mut forms, mut names) = (Vec::new(), Vec::new());
        for (name, secret) in secrets {
            for line in secret.lines().filter(|line| line.len() > 8 && !line.starts_with("-----")) {
                let encoded = (0..3).map(|before| aligned(line, before));
                let all: Vec<_> = encoded.chain([line.to_owned(), percent(line)]).collect();
                names.extend(std::iter::repeat_n(*name, all.len()));
                forms.extend(all);
            }
        }
        Self { forms: AhoCorasick::new(forms).unwrap(), names }
    }

    /// Those that are somewhere in what was found at a place.
    pub(crate) fn within(&self, place: &str, bytes: &[u8]) -> Vec<String> {
        let found = self.forms.find_iter(bytes).map(|hit| self.names[hit.pattern().as_usize()]);
        let mut found: Vec<_> = found.map(|name| format!("{name} in {place}")).collect();
        found.dedup();
        found
    }

    /// Those in what the engine keeps that was changed since a time, in seconds since 1970.
    pub(crate) fn in_engine(&self, since: i64) -> Vec<String> {
        self.below_since(Path::new(&docker(&["info", "--format", "{{.DockerRootDir}}"])), since)
    }

    /// Those in the files of a folder, also where they are compressed.
    pub(crate) fn below(&self, folder: &Path) -> Vec<String> {
        self.below_since(folder, 0)
    }

    fn below_since(&self, folder: &Path, since: i64) -> Vec<String> {
        let mut found = Vec::new();
        for entry in folder.read_dir().into_iter().flatten().flatten() {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let name = path.display().to_string();
            if kind.is_dir() {
                found.extend(self.below_since(&path, since));
            } else if kind.is_file() && entry.metadata().is_ok_and(|of| of.ctime() >= since) {
                let bytes = std::fs::read(&path).unwrap_or_default();
                found.extend(self.within(&name, &bytes));
                if bytes.starts_with(&[0x1f, 0x8b]) {
                    let said = Command::new("gzip").args(["-dc"]).arg(&path).output().unwrap();
                    found.extend(self.within(&format!("{name}, decompressed"), &said.stdout));
                }
            }
        }
        found
    }

    /// Looks for them in the arguments and variables of this machine's processes, until it is ended.
    pub(crate) fn watch(self: &Arc<Self>) -> Watch {
        let (canaries, is_over) = (Arc::clone(self), Arc::new(AtomicBool::new(false)));
        let until = Arc::clone(&is_over);
        Watch { is_over, thread: Some(std::thread::spawn(move || canaries.in_processes(&until))) }
    }

    fn in_processes(&self, is_over: &AtomicBool) -> Vec<String> {
        let mut found = Vec::new();
        while !is_over.load(Ordering::SeqCst) {
            for process in Path::new("/proc").read_dir().unwrap().flatten() {
                for file in ["cmdline", "environ"] {
                    let bytes = std::fs::read(process.path().join(file)).unwrap_or_default();
                    let place = || format!("{file} of {}", String::from_utf8_lossy(&bytes));
                    if self.forms.is_match(&bytes) {
                        found.extend(self.within(&place(), &bytes));
                    }
                }
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        found
    }
}

/// A look at processes that goes on until it is ended, or dropped.
pub(crate) struct Watch {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl Watch {
    /// What was found.
    pub(crate) fn end(mut self) -> Vec<String> {
        self.is_over.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
    }
}

/// Programs that are run as ever, and before that write down with which words and variables: however short they run.
pub(crate) struct Recorders {
    folder: TempDir,
    programs: &'static [&'static str],
}

impl Recorders {
    pub(crate) fn of(programs: &'static [&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let all = environment("PATH").unwrap();
        for name in programs {
            let real =
                all.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.exists()).unwrap();
            let script = format!(
                "#!/bin/sh\n{{ printf '%s\\0' \"$@\"; /bin/cat /proc/$$/environ; }} > '{}/{name}.'$$\nexec '{}' \"$@\"\n",
                folder.path().display(),
                real.display()
            );
            let path = folder.path().join(name);
            std::fs::write(&path, script).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { folder, programs }
    }

    /// The `PATH` of who is to run them.
    pub(crate) fn path(&self) -> PathBuf {
        format!("{}:{}", self.folder.path().display(), environment("PATH").unwrap()).into()
    }

    /// Where they write it down. Each has been run.
    pub(crate) fn calls(&self) -> &Path {
        let names = self.folder.path().read_dir().unwrap().flatten();
        let names: Vec<_> = names.map(|entry| entry.file_name().into_string().unwrap()).collect();
        for program in self.programs {
            let of = format!("{program}.");
            assert!(names.iter().any(|name| name.starts_with(&of)), "{program} was not run: {names:?}");
        }
        self.folder.path()
    }
}
