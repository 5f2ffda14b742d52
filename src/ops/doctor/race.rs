//! Does the store let exactly one of several racing writers create an object? Every commit rests on it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use epochfs_format::hex;

use super::Check;
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::random;
use crate::platform::store::{Put, Store};

const NAME: &str = "put-if-absent";
const WRITERS: usize = 16;
const ROUNDS_MAX: usize = 32;
const ROUNDS_MIN: usize = 4;

/// On a slow store the rounds end early.
const TIME_MAX: Duration = Duration::from_secs(3);

/// Some stores let the losers of a race wait for seconds: then fewer run in the next one.
const ROUND_IS_SLOW: Duration = Duration::from_millis(800);
const WRITERS_MIN: usize = 4;

/// Where the scratch objects are. No part of a repository lives there.
pub(super) const PREFIX: &str = "doctor/";

type Open<'a> = &'a (dyn Fn() -> Result<Arc<dyn Store>> + Sync);

const NEXT_STEP: &str = "do not use this store for a repository; on NFS, use version 4 and a server with hard links; of S3 \
                         services, use one that enforces If-None-Match";

/// Refuses a store that lets several racing writers create the same object.
pub fn prove_put_if_absent(open: Open) -> Result<()> {
    let stores = (0..WRITERS).map(|_| open()).collect::<Result<Vec<_>>>()?;
    match race(&stores).outcome {
        Ok(()) => Ok(()),
        Err(Flaw::Store(error)) => Err(error),
        Err(Flaw::Broken(what)) => {
            let message = format!("{} is not safe for a repository: {}", stores[0].url(), consequence(&what));
            Err(Error::new(Kind::Unsupported, message).hint(NEXT_STEP))
        }
    }
}

fn consequence(what: &str) -> String {
    format!("{what}: two hosts could both believe that they own a machine")
}

struct Race {
    rounds: usize,
    outcome: std::result::Result<(), Flaw>,
    prefix: String,
    /// Objects that could not be removed again.
    left: usize,
}

/// Races writers, each with a store of its own as on a host of its own, and removes what they wrote.
fn race(stores: &[Arc<dyn Store>]) -> Race {
    let prefix = format!("{PREFIX}{}", hex(&random::id16()));
    let started = Stopwatch::start();
    let (mut rounds, mut writers) = (0, stores.len());
    let mut outcome = Ok(());
    while outcome.is_ok() && rounds < ROUNDS_MAX && (rounds < ROUNDS_MIN || started.elapsed() < TIME_MAX) {
        let before = started.elapsed();
        outcome = round(&stores[..writers], &format!("{prefix}/{rounds}"));
        rounds += 1;
        if started.elapsed() - before > ROUND_IS_SLOW {
            writers = (writers / 2).max(WRITERS_MIN.min(stores.len()));
        }
    }
    let left = (0..rounds).filter(|round| stores[0].delete(&format!("{prefix}/{round}")).is_err()).count();
    Race { rounds, outcome, prefix, left }
}

pub(super) fn check(open: Open) -> Check {
    let stores = match (0..WRITERS).map(|_| open()).collect::<Result<Vec<_>>>() {
        Ok(stores) => stores,
        Err(error) => return Check::failed(NAME, &error, "open the repository again"),
    };
    let started = Stopwatch::start();
    let Race { rounds, outcome, prefix, left } = race(&stores);
    match outcome {
        Err(Flaw::Store(error)) => Check::failed(NAME, &error, "make the repository writable, and repeat"),
        Err(Flaw::Broken(what)) => Check::fail(NAME, consequence(&what), NEXT_STEP),
        Ok(()) if left > 0 => Check::warn(
            NAME,
            format!("one winner in each of {rounds} races, but {left} scratch objects could not be removed"),
            format!("remove {prefix}/ from the repository"),
        ),
        Ok(()) => Check::ok(
            NAME,
            format!("one winner in each of {rounds} races of {WRITERS} writers, {} ms", started.elapsed().as_millis()),
        ),
    }
}

enum Flaw {
    /// The store failed, which says nothing about its promise.
    Store(Error),
    /// The store broke its promise.
    Broken(String),
}

impl From<Error> for Flaw {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

fn content(writer: usize) -> Vec<u8> {
    format!("writer {writer}\n").repeat(50).into_bytes()
}

fn round(stores: &[Arc<dyn Store>], key: &str) -> std::result::Result<(), Flaw> {
    let barrier = Barrier::new(stores.len());
    let ready = AtomicUsize::new(0);
    let puts: Vec<Result<Put>> = std::thread::scope(|scope| {
        let writers: Vec<_> = stores
            .iter()
            .enumerate()
            .map(|(writer, store)| {
                let (barrier, ready) = (&barrier, &ready);
                scope.spawn(move || {
                    let bytes = content(writer);
                    barrier.wait();
                    // Waking up takes threads unequally long: the last one to come here starts the race.
                    ready.fetch_add(1, Ordering::AcqRel);
                    while ready.load(Ordering::Acquire) < stores.len() {
                        std::thread::yield_now();
                    }
                    store.put_if_absent(key, &[&bytes])
                })
            })
            .collect();
        let failed = || Err(Error::new(Kind::Io, "a writing thread failed"));
        writers.into_iter().map(|writer| writer.join().unwrap_or_else(|_| failed())).collect()
    });
    let mut winners = Vec::new();
    for (writer, put) in puts.into_iter().enumerate() {
        if put? == Put::Created {
            winners.push(writer);
        }
    }
    if winners.is_empty() {
        // A store that repeats by itself may tell the winner that its own first try was in its way.
        let bytes = stores[0].get(key)?;
        winners.extend((0..stores.len()).find(|writer| content(*writer) == bytes));
    }
    let [winner] = winners[..] else {
        return Err(Flaw::Broken(format!(
            "{} of {} racing writers created the same object",
            winners.len(),
            stores.len()
        )));
    };
    // Each host must see the winner's bytes from then on.
    for store in stores {
        if store.get(key)? != content(winner) {
            return Err(Flaw::Broken("an object holds the bytes of a writer that was told that it lost".to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::path::PathBuf;

    use bytes::Bytes;

    use super::*;
    use crate::ops::doctor::Status;
    use crate::platform::files::RealFiles;
    use crate::platform::store::{Counters, LocalStore, ObjectInfo, ObjectWriter, Tail};

    /// A store that looks first and writes then, as one without put-if-absent would have to.
    struct LooksThenWrites {
        store: LocalStore,
        root: PathBuf,
    }

    impl Store for LooksThenWrites {
        fn url(&self) -> String {
            self.store.url()
        }

        fn counters(&self) -> &Counters {
            self.store.counters()
        }

        fn get(&self, key: &str) -> Result<Bytes> {
            self.store.get(key)
        }

        fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
            self.store.get_range(key, range)
        }

        fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
            self.store.get_tail(key, len)
        }

        fn len(&self, key: &str) -> Result<Option<u64>> {
            self.store.len(key)
        }

        fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
            if self.store.len(key)?.is_some() {
                return Ok(Put::Exists);
            }
            std::thread::sleep(Duration::from_millis(5));
            let path = self.root.join(key);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, parts.concat()).unwrap();
            Ok(Put::Created)
        }

        fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
            self.store.writer(key)
        }

        fn list(
            &self,
            prefix: &str,
            after: Option<&str>,
            each: &mut dyn FnMut(ObjectInfo) -> Result<bool>,
        ) -> Result<()> {
            self.store.list(prefix, after, each)
        }

        fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
            self.store.list_dirs(prefix)
        }

        fn delete(&self, key: &str) -> Result<()> {
            self.store.delete(key)
        }
    }

    fn objects(store: &dyn Store) -> usize {
        let mut count = 0;
        let mut each = |_| {
            count += 1;
            Ok(true)
        };
        store.list("", None, &mut each).unwrap();
        count
    }

    #[test]
    fn a_local_store_has_one_winner_and_is_left_empty() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Ok(Arc::new(LocalStore::open(dir.path(), Arc::new(RealFiles))?) as Arc<dyn Store>);
        let check = check(&open);
        assert_eq!(check.status, Status::Ok, "{check:?}");
        assert_eq!(objects(&*open().unwrap()), 0);
    }

    #[test]
    fn a_store_that_lets_two_win_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let store = LocalStore::open(dir.path(), Arc::new(RealFiles))?;
            Ok(Arc::new(LooksThenWrites { store, root: dir.path().to_owned() }) as Arc<dyn Store>)
        };
        let check = check(&open);
        assert_eq!(check.status, Status::Fail, "{check:?}");
        assert!(check.found.contains("racing writers created the same object"), "{check:?}");
        assert_eq!(objects(&*open().unwrap()), 0);
    }
}
