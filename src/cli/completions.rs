//! `epochfs completions`

use std::process::ExitCode;

use clap_complete::Shell;
use serde_json::json;

use super::context::Context;
use crate::error::Result;

/// Print a script that completes this command's words in a shell.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs completions bash > /etc/bash_completion.d/epochfs\n  epochfs completions zsh > ~/.zfunc/_epochfs\n  epochfs completions fish > ~/.config/fish/completions/epochfs.fish"
)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "epochfs", &mut script);
        let script = String::from_utf8_lossy(&script).into_owned();
        let document = json!({"shell": self.shell.to_string(), "script": script});
        context.print(&document, || script)?;
        Ok(ExitCode::SUCCESS)
    }
}
