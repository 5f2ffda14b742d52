//! `epochfs umount`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use crate::error::{Error, Result};
use crate::ops::control::{Client, sockets};
use crate::ops::mounts::{Liveness, liveness, mount_at, resolve, unmount};

/// Unmount a repository, and wait until its daemon has stored everything and ended.
///
/// While files on the mount are open this fails, and says who has them. A mount whose daemon died is taken away.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs umount /mnt/epochs\n  epochfs umount --lazy /mnt/epochs")]
pub struct Umount {
    /// Where the repository is mounted.
    mountpoint: PathBuf,
    /// Take the mount away at once; whoever has files open keeps them, and the daemon runs until they are closed.
    #[arg(long, short)]
    lazy: bool,
}

/// What came of it.
struct Outcome {
    repository: String,
    /// Whether the daemon has ended; none where it cannot be told.
    ended: Option<bool>,
    holders: Vec<String>,
    /// Machines with changes that no epoch holds; none where it cannot be told.
    uncommitted: Option<Vec<String>>,
}

impl Umount {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let path = resolve(&self.mountpoint)
            .map_err(|error| Error::io(format!("the mountpoint {}", self.mountpoint.display()), error))?;
        let outcome = match self.ask(context, &path)? {
            Some(outcome) => outcome,
            None => self.unmount_directly(&path)?,
        };
        let document = json!({
            "mountpoint": path.display().to_string(),
            "repository": outcome.repository,
            "ended": outcome.ended,
            "holders": outcome.holders,
            "uncommitted": outcome.uncommitted,
        });
        context.print(&document, || match outcome.ended {
            Some(false) => {
                let mut text = format!("unmounted {}; the daemon runs until files are closed:\n", path.display());
                outcome.holders.iter().for_each(|holder| text += &format!("  {holder}\n"));
                text
            }
            _ => format!("unmounted {}\n", path.display()),
        })?;
        if let Some(machines) = outcome.uncommitted.filter(|machines| !machines.is_empty()) {
            context.notice(&format!(
                "no epoch holds what was changed of {}: it stays on this host; mount again, and commit",
                machines.join(", ")
            ));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Asks the daemon whose mount it is, if it can be found.
    fn ask(&self, context: &Context, path: &Path) -> Result<Option<Outcome>> {
        for socket in sockets(&context.state_directory()) {
            let who = match Client::ask(&socket, Client::ping) {
                Ok(Some(who)) if Path::new(&who.mountpoint) == path => who,
                Ok(_) => continue,
                Err(error) => {
                    // Another user's, maybe, and no concern of this mount.
                    tracing::debug!(%error, "skipped a daemon");
                    continue;
                }
            };
            let unmounted = Client::ask(&socket, |client| client.umount(self.lazy))?;
            return Ok(Some(match unmounted {
                Some(unmounted) => Outcome {
                    repository: who.repository,
                    ended: Some(unmounted.ended),
                    holders: unmounted.holders,
                    uncommitted: unmounted.ended.then_some(unmounted.uncommitted),
                },
                // Somebody else was quicker.
                None => {
                    Outcome { repository: who.repository, ended: Some(true), holders: Vec::new(), uncommitted: None }
                }
            }));
        }
        Ok(None)
    }

    /// The mount of a daemon that died, or that keeps its state elsewhere.
    fn unmount_directly(&self, path: &Path) -> Result<Outcome> {
        let Some(mount) = mount_at(path)?.filter(|mount| mount.is_ours()) else {
            return Err(Error::not_found(format!("no repository is mounted at {}", path.display()))
                .hint("`epochfs status` lists the mounts of this host's daemons"));
        };
        let is_dead = liveness(path) == Liveness::Dead;
        unmount(path, self.lazy || is_dead)?;
        Ok(Outcome {
            repository: mount.repository(),
            ended: is_dead.then_some(true),
            holders: Vec::new(),
            uncommitted: None,
        })
    }
}
