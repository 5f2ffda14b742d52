//! What a crash may do to each kind of file, and what it may not.
//!
//! Each writer numbers its operations. A model knows which were begun (`issued`), which came back (`returned`) and which
//! were acknowledged by fsync, msync or a commit (`synced`). After a kill, live must be as after some operation from
//! `synced` on; an epoch must be as after one operation that lies between what had returned when the commit began and what
//! was issued when it ended: not a page of it earlier or later.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use epochfs::platform::random::Seeded;

use crate::must;
use crate::support::{Check, PAGE, Saying, open};

/// A moment in the life of each writer.
pub type Moment = Vec<u64>;

pub trait Model: Send {
    /// What a commit that begins now must hold.
    fn floor(&self) -> Moment;
    /// What nothing that ends now can hold more than.
    fn issued(&self) -> u64;
    fn check_live(&self, directory: &Path) -> Check;
    fn check_epoch(&self, directory: &Path, floor: &Moment, ceiling: u64) -> Check;
    /// Takes what is there, all of it synced, as the beginning.
    fn rebase(&mut self, directory: &Path) -> Check;
}

/// A word of a page of some version. No two are equal, but for the zeros of version 0.
fn word(version: u64, file: u64, page: u64, index: usize) -> u64 {
    match (version, index) {
        (0, _) => 0,
        (version, 0) => version,
        _ => Seeded::of(version, (file << 50) | (page << 16) | index as u64).next(),
    }
}

pub fn page_of(version: u64, file: u64, page: u64) -> Vec<u8> {
    (0..PAGE / 8).flat_map(|index| word(version, file, page, index).to_le_bytes()).collect()
}

/// The version of a page, all of whose words are of that version.
fn version_of(bytes: &[u8], file: u64, page: u64) -> Check<u64> {
    let version = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    must!(bytes == page_of(version, file, page), "page {page} of file {file} is no page of version {version}");
    Ok(version)
}

/// Files written page by page with write(2).
#[derive(Clone, Debug)]
pub struct Pages {
    pub name: String,
    pub id: u64,
    pub files: u64,
    pub pages: u64,
    /// By file and page: the version at the beginning, and those that were written since.
    versions: BTreeMap<(u64, u64), Vec<u64>>,
    pub issued: u64,
    pub returned: u64,
    pub synced: u64,
}

impl Pages {
    pub fn new(name: &str, id: u64, files: u64, pages: u64) -> Self {
        let versions = (0..files).flat_map(|file| (0..pages).map(move |page| ((file, page), vec![0]))).collect();
        Self { name: name.into(), id, files, pages, versions, issued: 0, returned: 0, synced: 0 }
    }

    pub fn path(&self, directory: &Path, file: u64) -> std::path::PathBuf {
        directory.join(format!("{}{file}", self.name))
    }

    /// Begins a write, and returns its version.
    pub fn issue(&mut self, file: u64, pages: std::ops::Range<u64>) -> u64 {
        self.issued += 1;
        for page in pages {
            self.versions.get_mut(&(file, page)).expect("a page of the file").push(self.issued);
        }
        self.issued
    }

    pub fn content(&self, version: u64, file: u64, pages: std::ops::Range<u64>) -> Vec<u8> {
        pages.flat_map(|page| page_of(version, self.id * 16 + file, page)).collect()
    }

    /// The version of a page after operation `moment`.
    fn at(&self, key: (u64, u64), moment: u64) -> u64 {
        let versions = &self.versions[&key];
        versions[versions.partition_point(|version| *version <= moment).max(1) - 1]
    }

    fn found(&self, directory: &Path) -> Check<BTreeMap<(u64, u64), u64>> {
        let mut found = BTreeMap::new();
        for file in 0..self.files {
            let path = self.path(directory, file);
            let bytes = fs::read(&path).saying(path.display())?;
            must!(bytes.len() as u64 == self.pages * PAGE as u64, "{} has {} bytes", path.display(), bytes.len());
            for (page, bytes) in bytes.chunks(PAGE).enumerate() {
                let version = version_of(bytes, self.id * 16 + file, page as u64).saying(path.display())?;
                found.insert((file, page as u64), version);
            }
        }
        Ok(found)
    }
}

impl Model for Pages {
    fn floor(&self) -> Moment {
        vec![self.returned]
    }

    fn issued(&self) -> u64 {
        self.issued
    }

    fn check_live(&self, directory: &Path) -> Check {
        for (key, version) in self.found(directory)? {
            let least = self.at(key, self.synced);
            must!(
                version >= least && self.versions[&key].contains(&version),
                "{}{}, page {}: version {version}, and {least} was synced (of {:?})",
                self.name,
                key.0,
                key.1,
                self.versions[&key]
            );
        }
        Ok(())
    }

    fn check_epoch(&self, directory: &Path, floor: &Moment, ceiling: u64) -> Check {
        let found = self.found(directory)?;
        let moment = found.values().copied().max().unwrap_or(0).max(floor[0]);
        must!(moment <= ceiling, "{}: version {moment} is later than {ceiling}", self.name);
        for (key, version) in found {
            let expected = self.at(key, moment);
            must!(
                version == expected,
                "{}{}, page {}: version {version} instead of {expected} in an epoch of moment {moment} (floor {}, ceiling {ceiling})",
                self.name,
                key.0,
                key.1,
                floor[0]
            );
        }
        Ok(())
    }

    fn rebase(&mut self, directory: &Path) -> Check {
        for (key, version) in self.found(directory)? {
            self.versions.insert(key, vec![version]);
        }
        (self.returned, self.synced) = (self.issued, self.issued);
        Ok(())
    }
}

/// A file that is mapped and stored into. A page may be taken for writeback while it is stored into, so that words of a
/// page may be of several versions, each of which was stored since the last sync.
#[derive(Clone, Debug)]
pub struct Mapped {
    pub name: String,
    pub id: u64,
    base: Vec<u8>,
    /// By page: the versions stored since the beginning.
    stores: Vec<Vec<u64>>,
    /// By page: the last version that was surely synced.
    pub synced: Vec<u64>,
    pub issued: u64,
}

impl Mapped {
    pub fn new(name: &str, id: u64, pages: usize) -> Self {
        Self {
            name: name.into(),
            id,
            base: vec![0; pages * PAGE],
            stores: vec![Vec::new(); pages],
            synced: vec![0; pages],
            issued: 0,
        }
    }

    pub fn pages(&self) -> usize {
        self.stores.len()
    }

    pub fn issue(&mut self, page: usize) -> u64 {
        self.issued += 1;
        self.stores[page].push(self.issued);
        self.issued
    }

    /// The last store to each page, all of which are done. A sync that begins now makes them durable.
    pub fn stored(&self) -> Vec<u64> {
        self.stores.iter().map(|stores| stores.last().copied().unwrap_or(0)).collect()
    }

    pub fn acknowledge(&mut self, stored: &[u64]) {
        for (synced, stored) in self.synced.iter_mut().zip(stored) {
            *synced = (*synced).max(*stored);
        }
    }

    fn check(&self, directory: &Path, synced: &[u64]) -> Check {
        let path = directory.join(&self.name);
        let bytes = fs::read(&path).saying(path.display())?;
        must!(bytes.len() == self.base.len(), "{} has {} bytes", path.display(), bytes.len());
        for (page, bytes) in bytes.chunks(PAGE).enumerate() {
            let mut allowed: Vec<Vec<u8>> = self.stores[page]
                .iter()
                .filter(|version| **version >= synced[page])
                .map(|version| page_of(*version, self.id * 16, page as u64))
                .collect();
            if synced[page] == 0 {
                allowed.push(self.base[page * PAGE..][..PAGE].to_vec());
            }
            for index in 0..PAGE / 8 {
                let range = index * 8..index * 8 + 8;
                must!(
                    allowed.iter().any(|allowed| allowed[range.clone()] == bytes[range.clone()]),
                    "{}, page {page}, word {index}: it is of no version from {} on (its first word says {}; stored: {:?})",
                    path.display(),
                    synced[page],
                    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")),
                    self.stores[page]
                );
            }
        }
        Ok(())
    }
}

impl Model for Mapped {
    fn floor(&self) -> Moment {
        self.synced.clone()
    }

    fn issued(&self) -> u64 {
        self.issued
    }

    fn check_live(&self, directory: &Path) -> Check {
        self.check(directory, &self.synced)
    }

    fn check_epoch(&self, directory: &Path, floor: &Moment, _: u64) -> Check {
        self.check(directory, floor)
    }

    fn rebase(&mut self, directory: &Path) -> Check {
        self.base = fs::read(directory.join(&self.name)).saying(&self.name)?;
        self.stores.iter_mut().for_each(Vec::clear);
        self.synced.fill(0);
        Ok(())
    }
}

/// A log that grows by records of no even length.
#[derive(Clone, Debug)]
pub struct Appended {
    pub name: String,
    pub issued: u64,
    pub returned: u64,
    pub synced: u64,
}

pub const RECORD: usize = 29;

/// The records with these numbers.
pub fn records(numbers: std::ops::Range<u64>) -> Vec<u8> {
    numbers.flat_map(|number| format!("{number:011} {:016x}\n", Seeded::of(number, 77).next()).into_bytes()).collect()
}

impl Appended {
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), issued: 0, returned: 0, synced: 0 }
    }

    fn read(&self, directory: &Path) -> Check<Vec<u8>> {
        let path = directory.join(&self.name);
        fs::read(&path).saying(path.display())
    }
}

impl Model for Appended {
    fn floor(&self) -> Moment {
        vec![self.returned]
    }

    fn issued(&self) -> u64 {
        self.issued
    }

    fn check_live(&self, directory: &Path) -> Check {
        let bytes = self.read(directory)?;
        let (synced, len) = (self.synced as usize * RECORD, bytes.len());
        must!(len >= synced, "{}: {len} bytes, and {synced} were synced", self.name);
        must!(len <= self.issued as usize * RECORD, "{}: {len} bytes were never written", self.name);
        let expected = records(0..self.issued);
        must!(bytes[..synced] == expected[..synced], "{}: what was synced is wrong", self.name);
        let is_right = |(found, expected): (&u8, &u8)| found == expected || *found == 0;
        must!(bytes.iter().zip(&expected).all(is_right), "{}: bytes that nobody wrote", self.name);
        Ok(())
    }

    fn check_epoch(&self, directory: &Path, floor: &Moment, ceiling: u64) -> Check {
        let bytes = self.read(directory)?;
        let count = (bytes.len() / RECORD) as u64;
        // The kernel sends a record that lies on two pages as two writes.
        let is_even = bytes.len() % RECORD == 0 || bytes.len() % PAGE == 0;
        must!(is_even, "{}: {} bytes end within a record", self.name, bytes.len());
        must!(count >= floor[0] && count <= ceiling, "{}: {count} records, not {}..={ceiling}", self.name, floor[0]);
        must!(bytes == records(0..count + 1)[..bytes.len()], "{}: other records than were written", self.name);
        Ok(())
    }

    fn rebase(&mut self, directory: &Path) -> Check {
        let bytes = self.read(directory)?;
        let expected = records(0..self.issued);
        let right = bytes.iter().zip(&expected).take_while(|(found, expected)| found == expected).count();
        let count = right / RECORD;
        let file = open(&directory.join(&self.name)).saying(&self.name)?;
        file.set_len((count * RECORD) as u64).saying(&self.name)?;
        file.sync_all().saying(&self.name)?;
        (self.issued, self.returned, self.synced) = (count as u64, count as u64, count as u64);
        Ok(())
    }
}

/// Files that appear by a rename, whole, and go by an unlink; and one that is replaced again and again.
#[derive(Clone, Debug)]
pub struct Names {
    pub name: String,
    /// The names after each operation since the beginning, by its number.
    states: BTreeMap<u64, BTreeSet<u64>>,
    pub issued: u64,
    pub returned: u64,
    pub synced: u64,
}

impl Names {
    pub fn new(name: &str) -> Self {
        let states = BTreeMap::from([(0, BTreeSet::new())]);
        Self { name: name.into(), states, issued: 0, returned: 0, synced: 0 }
    }

    pub fn content(number: u64) -> Vec<u8> {
        records(number * 100..number * 100 + 50 + number % 300)
    }

    pub fn now(&self) -> &BTreeSet<u64> {
        self.states.last_key_value().expect("a state").1
    }

    /// Begins an operation that makes or removes a name.
    pub fn issue(&mut self, number: u64, is_made: bool) {
        let mut state = self.now().clone();
        if is_made {
            state.insert(number)
        } else {
            state.remove(&number)
        };
        self.issued += 1;
        self.states.insert(self.issued, state);
    }

    fn found(&self, directory: &Path) -> Check<BTreeSet<u64>> {
        let directory = directory.join(&self.name);
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&directory).saying(directory.display())? {
            let entry = entry.saying(directory.display())?;
            let name = entry.file_name().into_string().unwrap_or_default();
            let Ok(number) = name.parse::<u64>() else { continue };
            // Its bytes were synced before it got its name.
            let bytes = fs::read(entry.path()).saying(entry.path().display())?;
            must!(bytes == Self::content(number), "{} has wrong content", entry.path().display());
            found.insert(number);
        }
        Ok(found)
    }

    fn check(&self, directory: &Path, moments: std::ops::RangeInclusive<u64>) -> Check {
        let found = self.found(directory)?;
        let is_possible = self.states.range(moments.clone()).any(|(_, state)| *state == found);
        must!(
            is_possible,
            "{}: the names {found:?} are of no moment in {moments:?}: {:?} to {:?}",
            self.name,
            self.states.range(moments.clone()).next(),
            self.states.range(moments.clone()).next_back()
        );
        Ok(())
    }
}

impl Model for Names {
    fn floor(&self) -> Moment {
        vec![self.returned]
    }

    fn issued(&self) -> u64 {
        self.issued
    }

    fn check_live(&self, directory: &Path) -> Check {
        self.check(directory, self.synced..=self.issued)
    }

    fn check_epoch(&self, directory: &Path, floor: &Moment, ceiling: u64) -> Check {
        self.check(directory, floor[0]..=ceiling)
    }

    fn rebase(&mut self, directory: &Path) -> Check {
        let found = self.found(directory)?;
        self.states = BTreeMap::from([(self.issued, found)]);
        (self.returned, self.synced) = (self.issued, self.issued);
        Ok(())
    }
}

#[test]
fn canary_each_model_notices_what_was_lost_torn_or_mixed() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    // Two writes, of which the first is synced.
    let mut pages = Pages::new("pages", 1, 1, 4);
    let write = |pages: &Pages, version: u64, range: std::ops::Range<u64>| {
        use std::os::unix::fs::FileExt;
        let bytes = pages.content(version, 0, range.clone());
        open(&pages.path(at, 0)).unwrap().write_all_at(&bytes, range.start * PAGE as u64).unwrap();
    };
    write(&pages, 0, 0..4);
    for (version, range) in [(1, 0..3), (2, 1..4)] {
        assert_eq!(pages.issue(0, range.clone()), version);
        write(&pages, version, range);
    }
    (pages.returned, pages.synced) = (2, 1);
    pages.check_live(at).unwrap();
    pages.check_epoch(at, &vec![2], 2).unwrap();
    assert!(pages.check_epoch(at, &vec![0], 1).is_err(), "an epoch of the future");
    write(&pages, 1, 1..2);
    pages.check_live(at).unwrap();
    assert!(pages.check_epoch(at, &vec![1], 2).unwrap_err().contains("instead of 2"), "half of a write");
    write(&pages, 0, 0..1);
    assert!(pages.check_live(at).is_err(), "a synced page is lost");
    write(&pages, 1, 0..1);
    let mut bytes = fs::read(pages.path(at, 0)).unwrap();
    bytes[PAGE + 100] ^= 1;
    fs::write(pages.path(at, 0), bytes).unwrap();
    assert!(pages.check_live(at).is_err(), "a flipped bit");

    let mut mapped = Mapped::new("mapped", 2, 2);
    let stored = |first: u64, second: u64| {
        let torn = [&page_of(first, 32, 0)[..2048], &page_of(second, 32, 0)[2048..]].concat();
        fs::write(at.join("mapped"), [torn, vec![0; PAGE]].concat()).unwrap();
    };
    assert_eq!((mapped.issue(0), mapped.issue(0), mapped.issue(0)), (1, 2, 3));
    stored(1, 0);
    mapped.check_live(at).unwrap();
    mapped.acknowledge(&[2, 0]);
    assert!(mapped.check_live(at).is_err(), "a synced store is lost");
    stored(3, 2);
    mapped.check_live(at).unwrap();
    stored(3, 1);
    assert!(mapped.check_live(at).is_err(), "half of a synced store is lost");

    let mut log = Appended::new("log");
    (log.issued, log.returned, log.synced) = (10, 9, 5);
    fs::write(at.join("log"), &records(0..10)[..7 * RECORD]).unwrap();
    log.check_live(at).unwrap();
    log.check_epoch(at, &vec![6], 10).unwrap();
    assert!(log.check_epoch(at, &vec![8], 10).is_err(), "a record that had returned is missing");
    fs::write(at.join("log"), &records(0..10)[..4 * RECORD + 3]).unwrap();
    assert!(log.check_live(at).is_err(), "a synced record is missing");

    let mut names = Names::new("names");
    fs::create_dir(at.join("names")).unwrap();
    for (number, is_made) in [(1, true), (2, true), (1, false)] {
        names.issue(number, is_made);
    }
    fs::write(at.join("names/2"), Names::content(2)).unwrap();
    names.synced = 3;
    names.check_live(at).unwrap();
    assert!(names.check_epoch(at, &vec![0], 2).is_err(), "a name went too early");
    fs::write(at.join("names/1"), Names::content(1)).unwrap();
    assert!(names.check_live(at).is_err(), "a removed name is back");
    fs::remove_file(at.join("names/1")).unwrap();
    fs::write(at.join("names/2"), "").unwrap();
    assert!(names.check_live(at).is_err(), "a file whose bytes were synced is empty");
}
