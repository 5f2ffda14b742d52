//! `epochfs init`

use std::process::ExitCode;

use epochfs_format::hex;
use serde_json::json;

use super::context::Context;
use crate::epoch::EpochStore;
use crate::error::Result;

/// Make a new, empty repository.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs --repo /srv/epochs init")]
pub struct Init {}

impl Init {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = EpochStore::create_directory(&context.repository_path()?)?;
        let repository = store.repository();
        let (id, url) = (hex(repository.id()), repository.url());
        context.print(&json!({"repository": url, "id": id}), || format!("made repository {id} at {url}\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
