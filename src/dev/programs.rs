//! Finds the programs that a stack runs, in the order of `tools/setup`.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::error::Error;

/// The image that runs the registry where no registry program is installed.
const REGISTRY_IMAGE: &str = "docker.io/library/registry:2";

/// What runs the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Registry {
    /// A program of this machine, run by `raw_exec`.
    Program(PathBuf),
    /// An image, run by the docker driver.
    Image(String),
}

impl Registry {
    /// An absolute path names a program, everything else an image.
    pub fn named(name: &str) -> Self {
        if name.starts_with('/') { Self::Program(name.into()) } else { Self::Image(name.into()) }
    }
}

/// Finds Nomad: on `PATH`, else where `tools/setup` puts one. `env` reads the environment.
pub fn find_nomad(env: impl Fn(&str) -> Option<String>) -> Result<PathBuf, Error> {
    if let Some(found) = on_path("nomad", &env) {
        return Ok(found);
    }
    let cache = env("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| env("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_default();
    let cached = cache.join("nomad-build/bin/nomad");
    if is_program(&cached) { Ok(cached) } else { Err(Error::NoNomad { cached }) }
}

/// Finds a registry: Debian's program on `PATH`, else the public image. `env` reads the environment.
pub fn find_registry(env: impl Fn(&str) -> Option<String>) -> Registry {
    on_path("docker-registry", env)
        .map_or_else(|| Registry::Image(REGISTRY_IMAGE.to_owned()), Registry::Program)
}

fn on_path(program: &str, env: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    std::env::split_paths(&env("PATH")?).map(|dir| dir.join(program)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &Path) -> String {
        path.to_str().unwrap().to_owned()
    }

    fn program(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_nomad_on_path_comes_before_the_cached_one() {
        let dir = tempfile::tempdir().unwrap();
        let cached = program(dir.path(), "cache/nomad-build/bin/nomad");
        let env = |key: &str| match key {
            "PATH" => Some(text(&dir.path().join("bin"))),
            "XDG_CACHE_HOME" => Some(text(&dir.path().join("cache"))),
            _ => None,
        };
        assert_eq!(find_nomad(env).unwrap(), cached);
        let first = program(dir.path(), "bin/nomad");
        assert_eq!(find_nomad(env).unwrap(), first);
    }

    #[test]
    fn a_missing_nomad_is_explained() {
        let error = find_nomad(|key| (key == "HOME").then(|| "/nowhere".into())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no Nomad found on PATH or at /nowhere/.cache/nomad-build/bin/nomad: \
             run tools/setup, or say where it is with --nomad"
        );
    }

    #[test]
    fn a_registry_is_a_program_or_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let env = |key: &str| (key == "PATH").then(|| text(dir.path()));
        assert_eq!(find_registry(env), Registry::Image(REGISTRY_IMAGE.into()));
        let found = program(dir.path(), "docker-registry");
        assert_eq!(find_registry(env), Registry::Program(found));
        assert_eq!(Registry::named("/usr/bin/registry"), Registry::Program("/usr/bin/registry".into()));
        assert_eq!(Registry::named("registry:2"), Registry::Image("registry:2".into()));
    }
}
