//! Extended attributes: users' own on live files, and what is known of epochs.

use epochfs_format::hex;

use super::FileSystem;
use super::object::{Object, Stored};
use crate::epoch::live::{self, Answer, Live, Refusal};

const USER: &[u8] = b"user.";
const OURS: &str = "user.epochfs.";

/// Whose live a file is in, by whatever path it is reached. It is told to who asks for it, and not listed: it is not the file's.
const MACHINE: &[u8] = b"user.epochfs.machine";

/// What is known of an epoch.
fn of_epoch(stored: &Stored) -> Vec<(String, String)> {
    let (record, commit) = (stored.epoch.record(), stored.epoch.commit());
    let mut all = vec![
        ("epoch", record.seq.to_string()),
        ("parent", commit.parent.to_string()),
        ("digest", hex(&commit.digest)),
        ("created", record.time_ns.to_string()),
        ("changed_pages", commit.changed_pages.to_string()),
        ("new_pages", commit.new_pages.to_string()),
        ("stored_bytes", commit.stored_len.to_string()),
        ("logical_bytes", commit.logical_len.to_string()),
    ];
    if !commit.message.is_empty() {
        all.push(("message", commit.message.clone()));
    }
    if !commit.tags.is_empty() {
        all.push(("tags", commit.tags.join(",")));
    }
    let mut named: Vec<(String, String)> =
        all.into_iter().map(|(name, value)| (format!("{OURS}{name}"), value)).collect();
    named.extend(commit.notes.iter().map(|(name, value)| (format!("{OURS}note.{name}"), value.clone())));
    named
}

fn of_live(live: &Live) -> Vec<(String, String)> {
    let status = live.status();
    let mut all = vec![("base", status.base.to_string()), ("dirty_pages", status.dirty_pages.to_string())];
    all.push(("state", status.state.to_owned()));
    if let Some(term) = status.term {
        all.push(("term", term.to_string()));
    }
    all.into_iter().map(|(name, value)| (format!("{OURS}{name}"), value)).collect()
}

impl FileSystem {
    /// All extended attributes, by name.
    pub fn extended(&self, inode: u64) -> Answer<Vec<(Vec<u8>, Vec<u8>)>> {
        let known = match self.object(inode)? {
            Object::Live(live, node) => {
                let mut all = live.extended(node)?;
                if node == live::ROOT {
                    all.extend(bytes(of_live(&live)));
                }
                return Ok(all);
            }
            Object::Stored(stored) if stored.path.is_empty() => of_epoch(&stored),
            Object::Stored(stored) => {
                return Ok(stored.entry().map_or(Vec::new(), |entry| entry.attributes.extended.clone()));
            }
            _ => Vec::new(),
        };
        Ok(bytes(known).collect())
    }

    pub fn get_extended(&self, inode: u64, name: &[u8]) -> Answer<Vec<u8>> {
        // Asked for at each write, and never there.
        if !name.starts_with(USER) {
            return Err(Refusal::NoAttribute);
        }
        if name == MACHINE
            && let Object::Live(live, _) = self.object(inode)?
        {
            return Ok(live.machine().as_bytes().to_vec());
        }
        let all = self.extended(inode)?;
        all.into_iter().find(|(other, _)| other == name).map(|(_, value)| value).ok_or(Refusal::NoAttribute)
    }

    /// Sets an extended attribute, or removes it.
    pub fn set_extended(&self, inode: u64, name: &[u8], value: Option<&[u8]>, exists: Option<bool>) -> Answer<()> {
        match self.object(inode)? {
            Object::Live(live, node) => {
                if !name.starts_with(USER) {
                    return Err(Refusal::NotSupported);
                }
                if node == live::ROOT && name.starts_with(OURS.as_bytes()) {
                    return Err(Refusal::NotPermitted);
                }
                live.set_extended(node, name, value, exists)
            }
            Object::Stored(_) => Err(Refusal::ReadOnly),
            _ => Err(Refusal::NotSupported),
        }
    }
}

fn bytes(all: Vec<(String, String)>) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> {
    all.into_iter().map(|(name, value)| (name.into_bytes(), value.into_bytes()))
}
