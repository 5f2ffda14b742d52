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
    after_help = "Examples:\n  epochfs --repo /srv/epochs init\n  AWS_ENDPOINT_URL=http://ceph:7480 epochfs --repo s3://bucket/epochs init\n  epochfs key generate /etc/epochfs/key\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key init --encrypt"
)]
pub struct Init {
    /// Encrypt everything that is stored, with a new key that lies there too, under yours (--key-file and the like).
    /// This cannot be changed later: what is there can be copied to another repository.
    #[arg(long, env = "EPOCHFS_ENCRYPT", value_parser = clap::builder::FalseyValueParser::new(), hide_env_values = true)]
    encrypt: bool,
}

impl Init {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let (location, keys) = (context.location()?, context.keys());
        let create = || match self.encrypt {
            true => EpochStore::create_sealed(&location, keys),
            false => EpochStore::create(&location),
        };
        let store = match &location {
            Location::Directory(path) => {
                let existed = path.exists();
                let store = create()?;
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
                create()?
            }
        };
        let repository = store.repository();
        let (id, url) = (hex(repository.id()), repository.url());
        let is_encrypted = repository.keyring().is_some();
        let kind = if is_encrypted { "encrypted repository" } else { "repository" };
        let document = json!({"repository": url, "id": id, "encrypted": is_encrypted});
        context.print(&document, || format!("made {kind} {id} at {url}\n"))?;
        if !is_encrypted && !keys.is_none() {
            context.notice("a key is given, and the repository is not encrypted: `init --encrypt` makes one that is");
        }
        Ok(ExitCode::SUCCESS)
    }
}
