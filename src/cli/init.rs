//! `epochfs init`

use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

use epochfs_format::hex;
use serde_json::json;

use super::context::Context;
use crate::epoch::EpochStore;
use crate::error::{Error, Result};
use crate::ops::doctor::prove_put_if_absent;
use crate::platform::store::Location;

/// Make a new, empty repository.
///
/// A directory that is made for it is open to its owner only: it will hold the memory of the guests. A bucket must exist;
/// racing writers prove first that its service lets exactly one of them create an object, for every commit rests on that.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs --repo /srv/epochs init\n  AWS_ENDPOINT_URL=http://ceph:7480 epochfs --repo s3://bucket/epochs init"
)]
pub struct Init {}

impl Init {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let location = context.location()?;
        let store = match &location {
            Location::Directory(path) => {
                let existed = path.exists();
                let store = EpochStore::create(&location)?;
                if !existed {
                    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
                        .map_err(|error| Error::io(format!("cannot set the mode of {}", path.display()), error))?;
                }
                store
            }
            Location::Bucket(_) => {
                // Asked first, so that a wrong name or key is told as what it is.
                location.open()?.len(epochfs_format::DESCRIPTOR_KEY)?;
                prove_put_if_absent(&|| location.open())?;
                EpochStore::create(&location)?
            }
        };
        let repository = store.repository();
        let (id, url) = (hex(repository.id()), repository.url());
        context.print(&json!({"repository": url, "id": id}), || format!("made repository {id} at {url}\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
