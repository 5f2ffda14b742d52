//! Notes beside the index: objects written while another process owned it, and the wish to have it rebuilt.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use epochfs_format::{ObjectRef, check_machine, hex, parse_id};

use super::database::Database;
use crate::error::{Error, Result};
use crate::platform::random;
use crate::repo::objects::Objects;

const REBUILD: &str = "rebuild";

fn notes(directory: &Path) -> PathBuf {
    directory.join("pending")
}

pub(super) fn create_directory(directory: &Path) -> Result<()> {
    let path = notes(directory);
    // For its owner only: it tells which pages the guests hold.
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|error| {
        Error::io(format!("{}: cannot create the directory of the page index", path.display()), error)
            .hint("choose another with --state-dir or EPOCHFS_STATE_DIR")
    })
}

pub(super) fn request_rebuild(directory: &Path) {
    if let Err(error) = fs::write(directory.join(REBUILD), b"") {
        tracing::warn!(directory = %directory.display(), %error, "cannot ask for a rebuild of the page index: delete it by hand");
    }
}

pub(super) fn rebuild_requested(directory: &Path) -> bool {
    directory.join(REBUILD).exists()
}

/// Forgets the notes: the rebuild that follows reads everything.
pub(super) fn clear(directory: &Path) -> Result<()> {
    for path in [notes(directory), directory.join(REBUILD)] {
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("{}: cannot remove it", path.display()), error));
            }
            _ => {}
        }
    }
    create_directory(directory)
}

/// Leaves word of a new object for the index's next owner.
pub(super) fn note(directory: &Path, object: &ObjectRef) -> Result<()> {
    let text = match object {
        ObjectRef::Pack(id) => format!("pack {}", hex(id)),
        ObjectRef::Record { machine, seq } => format!("record {seq} {machine}"),
    };
    let path = notes(directory).join(hex(&random::id16()));
    fs::write(&path, text).map_err(|error| Error::io(format!("{}: cannot write", path.display()), error))
}

fn parse(text: &str) -> Option<ObjectRef> {
    let (kind, rest) = text.split_once(' ')?;
    match kind {
        "pack" => Some(ObjectRef::Pack(parse_id(rest)?)),
        "record" => {
            let (seq, machine) = rest.split_once(' ')?;
            check_machine(machine).ok()?;
            Some(ObjectRef::Record { machine: machine.into(), seq: seq.parse().ok()? })
        }
        _ => None,
    }
}

/// Adds what other processes left word of.
pub(super) fn ingest(directory: &Path, database: &Database, objects: &Objects) -> Result<()> {
    let path = notes(directory);
    let failed = |error| Error::io(format!("{}: cannot read", path.display()), error);
    for entry in fs::read_dir(&path).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // A note that was cut short names nothing: its object is only not found again.
        if let Some(object) = fs::read_to_string(&path).ok().as_deref().and_then(parse) {
            match objects.footer(&object) {
                Ok(footer) => database.put(&object, footer.iter())?,
                Err(error) if error.kind().is_of_object() => {
                    tracing::warn!(%error, "a noted object is not indexed");
                }
                Err(error) => return Err(error),
            }
        }
        fs::remove_file(&path).map_err(|error| Error::io(format!("{}: cannot remove", path.display()), error))?;
    }
    Ok(())
}
