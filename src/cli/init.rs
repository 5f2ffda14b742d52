//! `epochfs init`

use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

use epochfs_format::hex;
use serde_json::json;

use super::context::Context;
use crate::epoch::EpochStore;
use crate::error::{Error, Result};

/// Make a new, empty repository.
///
/// A directory that is made for it is open to its owner only: it will hold the memory of the guests.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs --repo /srv/epochs init")]
pub struct Init {}

impl Init {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let path = context.repository_path()?;
        let existed = path.exists();
        let store = EpochStore::create_directory(&path)?;
        if !existed {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))
                .map_err(|error| Error::io(format!("cannot set the mode of {}", path.display()), error))?;
        }
        let repository = store.repository();
        let (id, url) = (hex(repository.id()), repository.url());
        context.print(&json!({"repository": url, "id": id}), || format!("made repository {id} at {url}\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
