//! Readers as a collector sees them: by their leases, and by its own clock.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{Lease, READERS_PREFIX, lease_key, parse_lease_key};

use crate::error::{Kind, Result};
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
    seen: HashMap<[u8; 16], (u64, Duration)>,
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
        let store = objects.store();
        let mut newest: BTreeMap<[u8; 16], u64> = BTreeMap::new();
        store.list(READERS_PREFIX, None, &mut |info| {
            if let Some((reader, number)) = parse_lease_key(&info.key) {
                let known = newest.entry(reader).or_default();
                *known = number.max(*known);
            }
            Ok(true)
        })?;
        self.seen.retain(|reader, _| newest.contains_key(reader));
        let mut standing = Standing { waiting: Vec::new(), held: Vec::new() };
        for (reader, number) in newest {
            let now = clock.elapsed();
            let (seen, since) = self.seen.entry(reader).or_insert((number, now));
            if *seen != number {
                (*seen, *since) = (number, now);
            }
            let silent = now.saturating_sub(*since);
            let lease = match store.get(&lease_key(&reader, number)) {
                Ok(bytes) => Lease::decode(&bytes, objects.repository()).ok(),
                // It was renewed or ended meanwhile, or is damaged: the next look tells, or time does.
                Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => None,
                Err(error) => return Err(error),
            };
            let valid_for =
                lease.as_ref().map_or(UNREADABLE_LEASE, |lease| Duration::from_millis(lease.lease_ms.into()));
            let heeded = lease.as_ref().map_or(0, |lease| lease.heeded);
            let (host, held) = lease.map_or_else(Default::default, |lease| (lease.host, lease.held));
            if heeded >= fence {
                standing.held.extend(held);
                continue;
            }
            if expire && silent >= valid_for && self.take_away(objects, &reader, number)? {
                tracing::info!(host, "a reader said nothing for {} s and is taken for dead", silent.as_secs());
                continue;
            }
            standing.waiting.push(Reader {
                host,
                reader: epochfs_format::hex(&reader),
                epochs: held.iter().map(|(machine, epoch)| format!("{machine}@{epoch}")).collect(),
                seconds_left: valid_for.saturating_sub(silent).as_secs(),
            });
        }
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
