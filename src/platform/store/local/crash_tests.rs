//! Cuts the power after each change of a history of puts, streams and deletes, and makes each of its calls fail.
//! What was acknowledged is there, and everything else is absent or whole.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::LocalStore;
use crate::platform::files::sim::{Direct, Failure};
use crate::platform::files::{Entry, File, Files, SimFiles};
use crate::platform::store::contract::{self, list_all, random_bytes};
use crate::platform::store::{Put, Store};
use crate::{Kind, Result};

const ROOT: &str = "/stores/one";

enum Step {
    Put(&'static str, usize),
    Stream(&'static str, usize),
    Delete(&'static str),
    /// Something else in the place of what is there.
    Replace(&'static str, usize),
    /// Another process makes a directory and dies before it syncs anything.
    Foreign(&'static str),
}

fn history() -> Vec<Step> {
    use Step::{Delete, Foreign, Put, Replace, Stream};
    vec![
        Put("log/1", 700),
        Foreign("/stores/one/found"),
        Foreign("/stores/one/found/deep"),
        Put("found/deep/a", 100),
        Put("log/2", 0),
        Put("packs/ab/small", 5000),
        Stream("packs/ab/large", (1 << 20) + 5000),
        Delete("log/1"),
        Stream("packs/cd/short", 3000),
        Put("log/1", 900),
        Put("top", 10),
        Replace("log/1", 1200),
        Replace("packs/ab/large", 2000),
        Delete("packs/ab/small"),
    ]
}

/// What a step did to a key, and where in the log it began and was acknowledged.
struct Event {
    key: &'static str,
    began: usize,
    acknowledged: Option<usize>,
    outcome: Option<Vec<u8>>,
}

/// What a caller does about an error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Retry {
    SameStore,
    /// Does not heed the advice to look at the device first.
    FreshStore,
}

fn put(store: &LocalStore, key: &str, bytes: &[u8]) -> Result<()> {
    let (first, second) = bytes.split_at(bytes.len() / 3);
    // There is one writer, so an object that exists is its own.
    store.put_if_absent(key, &[first, second]).map(|_: Put| ())
}

fn stream(store: &LocalStore, key: &str, bytes: &[u8]) -> Result<()> {
    let mut writer = store.writer(key)?;
    bytes.chunks(300_000).try_for_each(|piece| writer.append(piece))?;
    match writer.finish() {
        Err(error) if error.kind() == Kind::Conflict => Ok(()),
        result => result,
    }
}

/// Makes the store, and tries again after an error, unless a sync has failed and that is heeded.
fn create(sim: &SimFiles, files: &Arc<dyn Files>, retry: Retry) -> Result<LocalStore> {
    let create = || LocalStore::create(Path::new(ROOT), Arc::clone(files));
    create().or_else(|error| {
        let lost = sim.log().iter().any(|line| line.ends_with("Dropped"));
        if lost && retry == Retry::SameStore { Err(error) } else { create() }
    })
}

/// Runs the history and retries once what fails.
fn run(sim: &SimFiles, files: &Arc<dyn Files>, retry: Retry) -> Vec<Event> {
    let mut events = Vec::new();
    let Ok(mut store) = create(sim, files, retry) else { return events };
    for (number, step) in history().into_iter().enumerate() {
        let began = sim.log_len();
        let (key, len) = match &step {
            Step::Put(key, len) | Step::Stream(key, len) | Step::Replace(key, len) => (*key, Some(*len)),
            Step::Delete(key) => (*key, None),
            Step::Foreign(path) => {
                let _ = sim.create_dir(Path::new(path));
                continue;
            }
        };
        let outcome = len.map(|len| random_bytes(number as u64, len));
        let step = |store: &LocalStore| match (&step, &outcome) {
            (Step::Stream(..), Some(bytes)) => stream(store, key, bytes),
            (Step::Replace(..), Some(bytes)) => store.replace(key, bytes),
            (_, Some(bytes)) => put(store, key, bytes),
            (_, None) => store.delete(key),
        };
        let mut result = step(&store);
        if result.is_err() {
            if retry == Retry::FreshStore
                && let Ok(fresh) = create(sim, files, retry)
            {
                store = fresh;
            }
            result = step(&store);
        }
        events.push(Event { key, began, acknowledged: result.is_ok().then(|| sim.log_len()), outcome });
        if result.is_err() && store.put_if_absent("log/1", &[]).is_err() {
            break;
        }
    }
    events
}

/// Says what is wrong with the files as they are after the first `prefix` changes.
fn check(files: &SimFiles, prefix: usize, events: &[Event]) -> std::result::Result<(), String> {
    let files: Arc<dyn Files> = Arc::new(files.clone());
    let store = match LocalStore::open(Path::new(ROOT), files) {
        Ok(store) => store,
        Err(error) if error.kind() == Kind::NotFound => {
            let acknowledged = events.iter().find(|event| event.acknowledged.is_some_and(|at| at <= prefix));
            return acknowledged.map_or(Ok(()), |event| Err(format!("{} is gone, with the store", event.key)));
        }
        Err(error) => return Err(error.to_string()),
    };
    let mut keys: Vec<&str> = events.iter().map(|event| event.key).collect();
    keys.sort_unstable();
    keys.dedup();
    for key in &keys {
        let found = match store.get(key) {
            Ok(bytes) => Some(bytes.to_vec()),
            Err(error) if error.kind() == Kind::NotFound => None,
            Err(error) => return Err(error.to_string()),
        };
        // The last acknowledged outcome, or that of a later step that had begun.
        let mut allowed: Vec<Option<&[u8]>> = vec![None];
        for event in events.iter().filter(|event| event.key == *key && event.began <= prefix) {
            if event.acknowledged.is_some_and(|at| at <= prefix) {
                allowed.clear();
            }
            allowed.push(event.outcome.as_deref());
        }
        if !allowed.contains(&found.as_deref()) {
            let lens = |bytes: Option<&[u8]>| bytes.map(<[u8]>::len);
            let allowed: Vec<_> = allowed.into_iter().map(lens).collect();
            return Err(format!("{key} has length {:?}, or other bytes; expected {allowed:?}", lens(found.as_deref())));
        }
    }
    let stray = list_all(&store, "", None).into_iter().find(|key| !keys.contains(&key.as_str()));
    stray.map_or(Ok(()), |key| Err(format!("{key} came from nowhere")))
}

/// Cuts the power everywhere, and returns the first thing that is wrong.
fn cut_everywhere(files: &SimFiles, events: &[Event], seeds: u64) -> std::result::Result<(), String> {
    for prefix in 0..=files.log_len() {
        for (loss, state) in files.crash_states(prefix, 1, seeds) {
            check(&state, prefix, events).map_err(|why| format!("after {prefix} changes, losing {loss:?}: {why}"))?;
        }
    }
    Ok(())
}

#[test]
fn keeps_the_contract_on_simulated_files() {
    for direct in [Direct::Works, Direct::RefusedAtCreate, Direct::RefusedAtWrite] {
        let files = SimFiles::new(0);
        files.set_direct(direct);
        let store: Arc<dyn Store> = Arc::new(LocalStore::create(Path::new(ROOT), Arc::new(files.clone())).unwrap());
        contract::check(&store);
        let left = files.read_dir(&Path::new(ROOT).join("tmp")).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn no_power_loss_takes_back_what_was_acknowledged() {
    let sim = SimFiles::new(0);
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let events = run(&sim, &files, Retry::SameStore);
    assert_eq!(events.len(), 12);
    assert!(events.iter().all(|event| event.acknowledged.is_some()));
    check(&sim, sim.log_len(), &events).unwrap();
    if let Err(why) = cut_everywhere(&sim, &events, 10) {
        panic!("{why}\n{}", sim.log().join("\n"));
    }
}

#[test]
fn the_store_goes_on_after_a_power_loss() {
    let sim = SimFiles::new(0);
    let files: Arc<dyn Files> = Arc::new(sim.clone());
    let events = run(&sim, &files, Retry::SameStore);
    for (loss, state) in (0..sim.log_len()).step_by(5).flat_map(|prefix| sim.crash_states(prefix, 2, 2)) {
        let files: Arc<dyn Files> = Arc::new(state.clone());
        let store = create(&state, &files, Retry::SameStore).unwrap();
        put(&store, "packs/ab/new", b"new").unwrap();
        let again = state.crash_state(state.log_len(), loss);
        let store = LocalStore::open(Path::new(ROOT), Arc::new(again)).unwrap();
        assert_eq!(&store.get("packs/ab/new").unwrap()[..], b"new");
    }
    assert!(!events.is_empty());
}

#[test]
fn the_crash_test_finds_a_sync_that_does_nothing() {
    for skip in [Skip::Files, Skip::Dirs, Skip::Root] {
        let sim = SimFiles::new(0);
        let files: Arc<dyn Files> = Arc::new(Lazy { files: sim.clone(), skip });
        let events = run(&sim, &files, Retry::SameStore);
        assert!(events.iter().all(|event| event.acknowledged.is_some()));
        assert!(cut_everywhere(&sim, &events, 10).is_err(), "nobody noticed that syncs were skipped: {skip:?}");
    }
}

fn failures() -> [Failure; 6] {
    let failure = |errno, lasting, after_effect| Failure { errno, lasting, after_effect };
    [
        failure(Errno::NOSPC, false, false),
        failure(Errno::NOSPC, true, false),
        failure(Errno::IO, false, false),
        failure(Errno::IO, false, true),
        failure(Errno::IO, true, false),
        failure(Errno::EXIST, false, true),
    ]
}

/// Fails each call in each way, and returns the first thing that is wrong with what is there afterwards.
fn fail_everywhere(retry: Retry, seeds: u64) -> std::result::Result<(), String> {
    let calls = {
        let sim = SimFiles::new(0);
        let files: Arc<dyn Files> = Arc::new(sim.clone());
        run(&sim, &files, retry);
        sim.calls()
    };
    for ordinal in 0..calls {
        for failure in failures() {
            let sim = SimFiles::new(ordinal);
            let files: Arc<dyn Files> = Arc::new(sim.clone());
            sim.fail_call(ordinal, failure);
            let events = run(&sim, &files, retry);
            sim.heal();
            let told = |why| format!("call {ordinal} failed with {failure:?}: {why}\n{}", sim.log().join("\n"));
            check(&sim, sim.log_len(), &events).map_err(told)?;
            let left = sim.read_dir(&Path::new(ROOT).join("tmp")).map_or(0, |left| left.len());
            // The one call may have been the removal of a temporary file, or have made one that nobody knows of.
            if left > 1 {
                return Err(told(format!("{left} temporary files are left")));
            }
            for (loss, state) in sim.crash_states(sim.log_len(), ordinal, seeds) {
                check(&state, sim.log_len(), &events).map_err(|why| told(format!("losing {loss:?}: {why}")))?;
            }
        }
    }
    Ok(())
}

#[test]
fn no_failing_call_takes_back_what_was_acknowledged() {
    fail_everywhere(Retry::SameStore, 2).unwrap_or_else(|why| panic!("{why}"));
}

/// Shows why a failed sync ends all writes: the same call on a fresh store is answered by a sync that succeeds
/// without having written anything, which the test above must be able to see.
#[test]
fn the_failure_test_finds_a_failed_sync_that_was_only_repeated() {
    assert!(fail_everywhere(Retry::FreshStore, 2).is_err());
}

#[test]
fn a_failed_sync_ends_all_writes_and_a_full_disk_does_not() {
    let sim = SimFiles::new(0);
    let store = LocalStore::create(Path::new("/one"), Arc::new(sim.clone())).unwrap();
    put(&store, "d/a", b"a").unwrap();
    // A put creates, writes, syncs, links, removes, and syncs the directory.
    let fail =
        |after, errno| sim.fail_call(sim.calls() + after, Failure { errno, lasting: false, after_effect: false });
    for (after, what) in [(0, "create"), (1, "write"), (2, "sync"), (3, "link")] {
        fail(after, Errno::NOSPC);
        let error = put(&store, "d/b", b"b").unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace, "{what}: {error}");
        assert!(error.to_string().contains("d/b") && error.next_step().is_some(), "{error}");
        assert_eq!(store.len("d/b").unwrap(), None);
    }
    put(&store, "d/b", b"b").unwrap();
    for after in [2, 5] {
        let store = LocalStore::open(Path::new("/one"), Arc::new(sim.clone())).unwrap();
        let mut writer = store.writer("d/w").unwrap();
        fail(after, Errno::IO);
        assert_eq!(put(&store, "d/c", b"c").unwrap_err().kind(), Kind::Io);
        let refused = [
            put(&store, "d/e", b"e").unwrap_err(),
            store.delete("d/a").unwrap_err(),
            store.writer("d/f").map(|_| ()).unwrap_err(),
            writer.append(b"w").and_then(|()| writer.finish()).unwrap_err(),
        ];
        assert!(refused.iter().all(|error| error.kind() == Kind::Io && error.next_step().is_some()));
        assert_eq!(&store.get("d/a").unwrap()[..], b"a");
    }
}

#[test]
fn a_link_that_succeeded_counts_whatever_was_reported() {
    for errno in [Errno::IO, Errno::EXIST, Errno::TIMEDOUT] {
        let sim = SimFiles::new(0);
        let store = LocalStore::create(Path::new("/one"), Arc::new(sim.clone())).unwrap();
        put(&store, "d/a", b"a").unwrap();
        sim.fail_call(sim.calls() + 3, Failure { errno, lasting: false, after_effect: true });
        assert_eq!(store.put_if_absent("d/b", &[b"b"]).unwrap(), Put::Created, "{errno}");
        assert_eq!(&store.get("d/b").unwrap()[..], b"b");
    }
}

#[test]
fn the_error_of_the_writing_thread_reaches_the_caller() {
    let sim = SimFiles::new(0);
    let store = LocalStore::create(Path::new("/one"), Arc::new(sim.clone())).unwrap();
    put(&store, "d/a", b"a").unwrap();
    for after in 0..8 {
        let mut writer = store.writer("d/w").unwrap();
        sim.fail_call(sim.calls() + after, Failure { errno: Errno::NOSPC, lasting: true, after_effect: false });
        let bytes = vec![1; 1 << 20];
        let result = (0..6).try_for_each(|_| writer.append(&bytes));
        let again = result.is_err().then(|| writer.append(&bytes));
        let finished = writer.finish();
        sim.heal();
        let error = result.and(finished).unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace, "{error}");
        assert!(error.to_string().contains("d/w"), "{error}");
        assert!(again.is_none_or(|again| again.is_err()));
        assert_eq!(store.len("d/w").unwrap(), None);
        assert!(sim.read_dir(Path::new("/one/tmp")).unwrap().is_empty());
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    Files,
    Dirs,
    Root,
}

/// Says that it synced what it did not.
struct Lazy {
    files: SimFiles,
    skip: Skip,
}

struct LazyFile {
    file: Arc<dyn File>,
    skip: Skip,
}

impl Lazy {
    fn wrap(&self, file: io::Result<Arc<dyn File>>) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(LazyFile { file: file?, skip: self.skip }))
    }
}

impl Files for Lazy {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.wrap(self.files.open(path))
    }
    fn open_writable(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.wrap(self.files.open_writable(path))
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.files.remove_dir(path)
    }
    fn create_new(&self, path: &Path, direct: bool) -> io::Result<Arc<dyn File>> {
        self.wrap(self.files.create_new(path, direct))
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.files.hard_link(from, to)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.files.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.files.remove_file(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.files.create_dir(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.files.read_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match self.skip {
            Skip::Dirs => Ok(()),
            Skip::Root if path == Path::new(ROOT) => Ok(()),
            _ => self.files.sync_dir(path),
        }
    }
    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        self.files.len(path)
    }
    fn modified_ns(&self, path: &Path) -> io::Result<u64> {
        self.files.modified_ns(path)
    }
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.files.canonicalize(path)
    }
}

impl File for LazyFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, buffer)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        if self.skip == Skip::Files { Ok(()) } else { self.file.sync() }
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }
    fn links(&self) -> io::Result<u64> {
        self.file.links()
    }
}
