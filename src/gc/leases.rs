//! Readers as a collector sees them: by their leases, and by its own clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{Lease, READERS_PREFIX, lease_key, parse_lease_key};

use crate::error::{Kind, Result};
use crate::platform::at_once::at_once;
use crate::platform::clock::Clock;
use crate::platform::store::keys_below;
use crate::repo::Objects;

/// How long a lease counts that cannot be read.
const UNREADABLE_LEASE: Duration = Duration::from_secs(60);

/// A reader that a collection waits for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Reader {
    pub host: String,
    pub reader: String,
    /// Epochs that it reads.
    pub epochs: Vec<String>,
    /// When it is taken for dead, unless it says something until then.
    pub seconds_left: u64,
}

/// What is known of readers from looking at their leases again and again.
#[derive(Default)]
pub struct Watch {
    seen: BTreeMap<[u8; 16], Seen>,
}

/// A reader's newest lease, which never changes, and since when it is the newest.
struct Seen {
    number: u64,
    since: Duration,
    lease: Option<Lease>,
}

/// How the readers stand to a record of the collector's log.
pub struct Standing {
    /// Those that have not heeded it yet.
    pub waiting: Vec<Reader>,
    /// What all others read.
    pub held: Vec<(Arc<str>, u64)>,
}

impl Watch {
    /// Looks at all leases. One that did not change for as long as it says is taken away.
    pub fn look(&mut self, objects: &Objects, clock: &dyn Clock, fence: u64, expire: bool) -> Result<Standing> {
        let mut newest: BTreeMap<[u8; 16], u64> = BTreeMap::new();
        objects.store().list(READERS_PREFIX, None, &mut |info| {
            if let Some((reader, number)) = parse_lease_key(&info.key) {
                let known = newest.entry(reader).or_default();
                *known = number.max(*known);
            }
            Ok(true)
        })?;
        self.seen.retain(|reader, _| newest.contains_key(reader));
        let new: Vec<([u8; 16], u64)> = newest
            .into_iter()
            .filter(|(reader, number)| self.seen.get(reader).is_none_or(|seen| seen.number != *number))
            .collect();
        let read = at_once(objects.store().is_remote(), &new, &|(reader, number)| read(objects, *reader, *number))?;
        let now = clock.elapsed();
        for ((reader, _), read) in new.into_iter().zip(read) {
            match read {
                Some((number, lease)) => drop(self.seen.insert(reader, Seen { number, since: now, lease })),
                // It has ended meanwhile.
                None => drop(self.seen.remove(&reader)),
            }
        }
        let mut standing = Standing { waiting: Vec::new(), held: Vec::new() };
        let mut dead = Vec::new();
        for (reader, Seen { number, since, lease }) in &self.seen {
            let silent = now.saturating_sub(*since);
            let valid_for =
                lease.as_ref().map_or(UNREADABLE_LEASE, |lease| Duration::from_millis(lease.lease_ms.into()));
            let is_dead = expire && silent >= valid_for;
            let (host, heeded, held) = match lease {
                Some(lease) => (lease.host.clone(), lease.heeded, &*lease.held),
                None => ("whoever wrote a lease that cannot be read".to_owned(), 0, &[][..]),
            };
            if is_dead {
                dead.push((*reader, *number, host.clone(), silent));
            }
            if heeded >= fence {
                standing.held.extend(held.iter().cloned());
                continue;
            }
            standing.waiting.push(Reader {
                host,
                reader: epochfs_format::hex(reader),
                epochs: held.iter().map(|(machine, epoch)| format!("{machine}@{epoch}")).collect(),
                seconds_left: valid_for.saturating_sub(silent).as_secs(),
            });
        }
        for (reader, number, host, silent) in dead {
            if self.take_away(objects, &reader, number)? {
                tracing::info!(host, "a reader said nothing for {} s and is taken for dead", silent.as_secs());
                let name = epochfs_format::hex(&reader);
                standing.waiting.retain(|waiting| waiting.reader != name);
            }
        }
        // In the same order each time.
        standing.waiting.sort_by(|a, b| (&a.host, &a.reader).cmp(&(&b.host, &b.reader)));
        Ok(standing)
    }

    /// Takes a silent reader's leases away, unless it has just written another: it then finds its own still there, or
    /// this finds the new one. Whether it is gone.
    fn take_away(&mut self, objects: &Objects, reader: &[u8; 16], number: u64) -> Result<bool> {
        let store = objects.store();
        let mut later = false;
        let list = |each: &mut dyn FnMut(u64, &str) -> Result<()>| {
            store.list(READERS_PREFIX, None, &mut |info| {
                match parse_lease_key(&info.key) {
                    Some((of, found)) if of == *reader => each(found, &info.key)?,
                    _ => {}
                }
                Ok(true)
            })
        };
        let mut old = Vec::new();
        list(&mut |found, key| {
            if found <= number {
                old.push(key.to_owned());
            }
            Ok(())
        })?;
        old.iter().try_for_each(|key| store.delete(key))?;
        list(&mut |found, _| {
            later |= found > number;
            Ok(())
        })?;
        self.seen.remove(reader);
        Ok(!later)
    }
}

/// A reader's newest lease, from the one with this number on, if it can be read; nothing if there is none any more.
fn read(objects: &Objects, reader: [u8; 16], number: u64) -> Result<Option<(u64, Option<Lease>)>> {
    let store = objects.store();
    let get = |number: u64| match store.get(&lease_key(&reader, number)) {
        Ok(bytes) => Ok(Some((number, Lease::decode(&bytes, objects.repository()).ok()))),
        Err(error) if error.kind() == Kind::Damaged => Ok(Some((number, None))),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    // It may be renewed just now, mostly under the next number, or end.
    for number in [number, number + 1] {
        if let Some(found) = get(number)? {
            return Ok(Some(found));
        }
    }
    let mut later = None;
    store.list(READERS_PREFIX, Some(&lease_key(&reader, number)), &mut |info| {
        match parse_lease_key(&info.key) {
            Some((of, found)) if of == reader => later = later.max(Some(found)),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    // One that renews it as quickly as that is looked at again.
    later.map_or(Ok(None), |later| Ok(Some(get(later)?.unwrap_or((later, None)))))
}

/// What readers say they read, with the host that does.
pub fn held_by_readers(objects: &Objects) -> Result<Vec<(Arc<str>, u64, String)>> {
    let store = objects.store();
    let mut held = Vec::new();
    for key in keys_below(&**store, READERS_PREFIX)? {
        let Ok(bytes) = store.get(&key) else { continue };
        let Ok(lease) = Lease::decode(&bytes, objects.repository()) else { continue };
        held.extend(lease.held.into_iter().map(|(machine, epoch)| (machine, epoch, lease.host.clone())));
    }
    Ok(held)
}
