//! A git repository in a temporary folder.

use std::path::Path;
use std::process::Command;

/// A repository with a branch `main`.
pub(crate) struct Repository {
    folder: tempfile::TempDir,
}

impl Repository {
    pub(crate) fn new() -> Self {
        Self::of_format("sha1")
    }

    /// One whose objects are named by this hash.
    pub(crate) fn of_format(hash: &str) -> Self {
        let repository = Self { folder: tempfile::tempdir().unwrap() };
        let format = format!("--object-format={hash}");
        repository.git(&["init", "--quiet", "--initial-branch=main", &format]);
        // Commits by their hash are what a forge gives; so does this repository.
        repository.git(&["config", "uploadpack.allowAnySHA1InWant", "true"]);
        repository
    }

    /// Writes a file.
    pub(crate) fn file(self, path: &str, content: &str) -> Self {
        let path = self.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    /// Commits everything.
    pub(crate) fn commit(self) -> Self {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message=x"]);
        self
    }

    /// Commits a tree in which each folder has ten times the same folder, so many deep: what is small to fetch and endless to
    /// check out.
    pub(crate) fn bomb(self, deep: u32) -> Self {
        let list = self.path().join("list");
        let mut object = ("100644 blob", self.git(&["hash-object", "-w", "--stdin"]));
        for _ in 0..deep {
            let entries = (0..10).map(|n| format!("{} {}\t{n}\n", object.0, object.1)).collect::<String>();
            std::fs::write(&list, entries).unwrap();
            let input = std::fs::File::open(&list).unwrap();
            let tree = Command::new("git").arg("mktree").current_dir(self.path()).stdin(input).output();
            object = ("040000 tree", String::from_utf8(tree.unwrap().stdout).unwrap().trim().to_owned());
        }
        let commit = self.git(&["commit-tree", "-m", "x", &object.1]);
        self.git(&["update-ref", "refs/heads/main", &commit]);
        self
    }

    /// Adds a submodule; the next commit has it.
    pub(crate) fn submodule(self, url: &str, path: &str) -> Self {
        self.git(&["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", url, path]);
        self
    }

    /// Runs git in the repository, and returns what it said.
    pub(crate) fn git(&self, arguments: &[&str]) -> String {
        let output = Command::new("git")
            .args(["-c", "user.name=it", "-c", "user.email=it@localhost"])
            .args(arguments)
            .current_dir(self.path())
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }
}
