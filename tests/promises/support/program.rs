//! The built program, as a child process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::{Check, Saying};

/// A copy of the program, which a build that goes on meanwhile does not replace.
pub struct Program {
    binary: PathBuf,
    repository: PathBuf,
    state: PathBuf,
}

impl Program {
    /// With its repository and its state in this directory.
    pub fn new(directory: &Path) -> Check<Self> {
        let binary = directory.join("epochfs");
        std::fs::copy(env!("CARGO_BIN_EXE_epochfs"), &binary).saying("copying the program")?;
        Ok(Self { binary, repository: directory.join("repository"), state: directory.join("state") })
    }

    /// With its repository and its state elsewhere.
    pub fn at(mut self, repository: PathBuf, state: PathBuf) -> Self {
        (self.repository, self.state) = (repository, state);
        self
    }

    /// A command that prints JSON.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--json").args(arguments).env_clear();
        command.env("EPOCHFS_REPO", &self.repository).env("EPOCHFS_STATE_DIR", &self.state);
        command
    }
}

pub fn run(command: &mut Command) -> Output {
    start(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))
        .wait_with_output()
        .expect("a child can be waited for")
}

/// Starts it. A child that another thread forked a moment ago may hold the copy open for writing until it executes its
/// own program.
pub fn start(command: &mut Command) -> Child {
    loop {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            started => return started.expect("the program starts"),
        }
    }
}
