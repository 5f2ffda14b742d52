//! Making the index anew from the footers of all packs and records.

use std::collections::HashSet;

use super::database::Database;
use crate::error::Result;
use crate::repo::log::objects_of;
use crate::repo::objects::{Objects, object_key};

/// What a rebuild found.
#[derive(Clone, Copy, Debug)]
pub struct Rebuilt {
    /// Why it was made.
    pub reason: &'static str,
    pub objects: u64,
    /// Objects whose footer could not be read: their pages are not found again.
    pub unreadable: u64,
}

/// Fills an empty index.
pub(super) fn rebuild(
    database: &Database,
    objects: &Objects,
    reason: &'static str,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Rebuilt> {
    let all = objects_of(objects)?;
    let quarantined = objects.look_for_quarantined()?;
    // A writer that died may have left an object that is not durable. One of a directory stands for all in it.
    let mut settled = HashSet::new();
    for key in all.iter().map(object_key) {
        if settled.insert(key.rsplit_once('/').map(|(directory, _)| directory.to_owned())) {
            objects.store().settle(&key)?;
        }
    }
    let mut rebuilt = Rebuilt { reason, objects: all.len() as u64, unreadable: 0 };
    for (done, object) in all.iter().enumerate() {
        progress(done as u64, rebuilt.objects);
        match objects.footer(object) {
            Ok(footer) => {
                // Of a page that was stored again because one of its blocks is damaged, the other is found.
                let whole = footer.iter().filter(|entry| !quarantined.holds_block(object, entry.offset));
                database.put(object, whole)?;
            }
            // One deleted meanwhile, or damaged: `verify` reports it; here it is only not indexed.
            Err(error) if error.kind().is_of_object() => {
                tracing::warn!(%error, "an object is not indexed");
                rebuilt.unreadable += 1;
            }
            Err(error) => return Err(error),
        }
    }
    database.set_complete()?;
    progress(rebuilt.objects, rebuilt.objects);
    Ok(rebuilt)
}
