//! Blocks that are known to be damaged and could not be repaired, so that no commit takes a page from them.
//!
//! The lists lie in the repository, for all hosts' writers. They are looked for when a commit begins; where each request
//! travels, not more than once a minute.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use epochfs_format::{ObjectRef, Place, QUARANTINE_PREFIX, QUARANTINED_MAX, Quarantine, quarantine_key};

use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;
use crate::platform::random;
use crate::platform::store::{Put, Store, keys_below};

/// A store that is far away is asked again only after so long.
const LOOK_AFTER: Duration = Duration::from_secs(60);

/// What is listed beyond this is not heeded: whoever lost more than four GiB of pages needs another repository.
const LISTS_MAX: usize = 8;

/// The blocks that all lists name.
#[derive(Debug, Default)]
pub struct Quarantined {
    /// The lists' keys, in order.
    keys: Vec<String>,
    /// Whether all of them could be read.
    is_sound: bool,
    /// The offsets of blocks, in rising order.
    objects: HashMap<ObjectRef, Vec<u32>>,
}

impl Quarantined {
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// How many blocks are listed.
    pub fn len(&self) -> u64 {
        self.objects.values().map(|blocks| blocks.len() as u64).sum()
    }

    /// Whether the block there is listed.
    pub fn holds(&self, place: &Place) -> bool {
        self.holds_block(&place.object, place.offset)
    }

    pub fn holds_block(&self, object: &ObjectRef, offset: u32) -> bool {
        !self.is_empty() && self.objects.get(object).is_some_and(|blocks| blocks.binary_search(&offset).is_ok())
    }

    fn add(&mut self, list: Quarantine) {
        for (object, blocks) in list.objects {
            let known = self.objects.entry(object).or_default();
            known.extend(blocks.iter().map(|(offset, _)| offset));
            known.sort_unstable();
            known.dedup();
        }
    }
}

/// What is known of the lists.
#[derive(Default)]
pub(super) struct Lists {
    known: RwLock<Arc<Quarantined>>,
    looked: Mutex<Looked>,
}

/// When it was looked for lists.
#[derive(Default)]
struct Looked {
    done: Option<Stopwatch>,
    failed: Option<(Stopwatch, Error)>,
}

impl Lists {
    pub fn known(&self) -> Arc<Quarantined> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks for lists, unless that was done a moment ago.
    pub fn look(&self, store: &dyn Store, repository: &[u8; 16]) -> Result<Arc<Quarantined>> {
        let asked = Stopwatch::start();
        let mut looked = lock(&self.looked);
        if store.is_remote() && looked.done.as_ref().is_some_and(|since| since.elapsed() < LOOK_AFTER) {
            return Ok(self.known());
        }
        // It failed for all who waited for it.
        if let Some((failed, error)) = &looked.failed
            && failed.elapsed() < asked.elapsed()
        {
            return Err(Error::new(error.kind(), error.to_string()));
        }
        match self.read(store, repository) {
            Ok(known) => {
                *looked = Looked { done: Some(Stopwatch::start()), failed: None };
                Ok(known)
            }
            Err(error) => {
                looked.failed = Some((Stopwatch::start(), Error::new(error.kind(), error.to_string())));
                Err(error)
            }
        }
    }

    /// The lists as they are now.
    pub fn read(&self, store: &dyn Store, repository: &[u8; 16]) -> Result<Arc<Quarantined>> {
        let keys = keys_below(store, QUARANTINE_PREFIX)?;
        let known = self.known();
        if known.keys == keys {
            return Ok(known);
        }
        let mut read = Quarantined { is_sound: keys.len() <= LISTS_MAX, keys, ..Quarantined::default() };
        for key in read.keys.clone().iter().take(LISTS_MAX) {
            match store.get(key).and_then(|bytes| Ok(Quarantine::decode(&bytes, repository)?)) {
                Ok(list) => read.add(list),
                // A repair has just put another in its place.
                Err(error) if error.kind() == Kind::NotFound => {}
                // Pages are proven when they are read: without the list, a commit may only lean on what is damaged.
                Err(error) if matches!(error.kind(), Kind::Damaged | Kind::Unsupported) => {
                    tracing::warn!("{key} is not heeded: {error}");
                    read.is_sound = false;
                }
                Err(error) => return Err(error),
            }
        }
        if read.keys.len() > LISTS_MAX {
            tracing::warn!(lists = read.keys.len(), "only the first {LISTS_MAX} lists of damaged blocks are heeded");
        }
        let read = Arc::new(read);
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = read.clone();
        Ok(read)
    }

    /// Puts these blocks, by object and in rising order, in the place of all that were listed so far. Returns how many of
    /// them are listed.
    pub fn write(
        &self,
        store: &dyn Store,
        repository: &[u8; 16],
        blocks: &[(ObjectRef, Vec<(u32, u32)>)],
    ) -> Result<u64> {
        let before = self.read(store, repository)?;
        let is_listed = |object: &ObjectRef, list: &[(u32, u32)]| {
            list.iter().all(|(offset, _)| before.holds_block(object, *offset))
        };
        let count: u64 = blocks.iter().map(|(_, list)| list.len() as u64).sum();
        let is_same = count == before.len() && blocks.iter().all(|(object, list)| is_listed(object, list));
        if is_same && (before.is_sound || before.keys.is_empty()) {
            return Ok(count);
        }
        let mut written = 0;
        for objects in in_lists(blocks).into_iter().take(LISTS_MAX) {
            written += objects.iter().map(|(_, list)| list.len() as u64).sum::<u64>();
            let bytes = Quarantine { repository: *repository, objects }.encode();
            loop {
                if store.put_if_absent(&quarantine_key(&random::id16()), &[&bytes])? == Put::Created {
                    break;
                }
            }
        }
        // Only now, so that what is damaged is listed all the time.
        before.keys.iter().try_for_each(|key| store.delete(key))?;
        self.read(store, repository)?;
        Ok(written)
    }
}

/// The blocks in lists of which none is too long.
fn in_lists(blocks: &[(ObjectRef, Vec<(u32, u32)>)]) -> Vec<Vec<(ObjectRef, Vec<(u32, u32)>)>> {
    let mut lists: Vec<Vec<(ObjectRef, Vec<(u32, u32)>)>> = Vec::new();
    let mut room = 0;
    for (object, list) in blocks {
        for part in list.chunks(QUARANTINED_MAX) {
            if lists.is_empty() || room < part.len() {
                lists.push(Vec::new());
                room = QUARANTINED_MAX;
            }
            room -= part.len();
            lists.last_mut().expect("there is one").push((object.clone(), part.to_vec()));
        }
    }
    lists
}
