//! fsx: random operations on one file beside a byte vector that says what it must hold.
//!
//! Reads, writes, mappings, O_DIRECT, truncation, fallocate, holes and copies, with commits and restarts of the daemon among
//! them. Committed epochs are compared with what the vector was. `EPOCHFS_LONG=1` makes it a million operations;
//! `EPOCHFS_SEED` repeats a run, whose seed and last operations a failure prints.
//!
//! Two things are the kernel's and not the mount's, and respected here: SEEK_DATA goes to a FUSE daemon without stores that
//! are still in mappings, and `mkdir` knows nothing of them either. So a file with such stores is synced first.
//!
//! Some commits are waited for by another thread, while operations go on: their epoch must be what the file was after one
//! operation or another that fell into that time.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use epochfs::platform::random::Seeded;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::must;
use crate::place::Place;
use crate::raw::Mapping;
use crate::support::{Aligned, Check, PAGE, Saying, difference, is_long, noise, open, open_direct, rename, same, seed};

/// The file crosses the 2 MiB that a leaf of the tree covers.
const LEN_MAX: usize = 3 << 20;
const EPOCHS_MAX: usize = 8;
/// O_DIRECT is asked for in units of a disk's sector.
const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Op {
    Read {
        at: usize,
        len: usize,
    },
    Write {
        at: usize,
        len: usize,
        content: u64,
    },
    DirectRead {
        at: usize,
        len: usize,
    },
    DirectWrite {
        at: usize,
        len: usize,
        content: u64,
    },
    /// `fresh`: by a mapping made for this, not by the one that stays.
    MapRead {
        at: usize,
        len: usize,
        fresh: bool,
    },
    MapWrite {
        at: usize,
        len: usize,
        content: u64,
        fresh: bool,
        sync: bool,
    },
    Truncate {
        len: usize,
        by_path: bool,
    },
    Allocate {
        mode: u32,
        at: usize,
        len: usize,
    },
    Copy {
        from: usize,
        to: usize,
        len: usize,
    },
    Sync {
        data_only: bool,
    },
    CheckHoles {
        from: usize,
    },
    CheckAll,
    Reopen,
    Rename,
    Commit {
        by_command: bool,
    },
    CommitBehind,
    DropEpoch,
    CheckEpoch {
        by_map: bool,
    },
    Restart,
}

/// A planted fault, which the comparison must notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sabotage {
    LostWrite,
    LostStore,
    TailNotZeroed,
    WrongLength,
    HoleNotPunched,
    ChangedEpoch,
    LostAtRestart,
}

/// A commit that another thread waits for.
struct Pending {
    number: u64,
    path: PathBuf,
    thread: JoinHandle<std::io::Result<()>>,
    /// What the file was since it began, after which operation.
    moments: Vec<(u64, Arc<Vec<u8>>)>,
}

/// After so many operations a commit is waited for.
const MOMENTS_MAX: usize = 40;
const PENDING_MAX: usize = 3;

struct Handles {
    file: File,
    direct: File,
    /// Maps all that the file can ever be, as a VMM holds its memory.
    map: Mapping,
}

struct Fsx {
    place: Place,
    seeded: Seeded,
    model: Vec<u8>,
    handles: Option<Handles>,
    name: &'static str,
    /// Stores in mappings may not have reached the daemon.
    unsynced: bool,
    epochs: BTreeMap<u64, (PathBuf, Vec<u8>)>,
    pending: VecDeque<Pending>,
    committed: u64,
    last: VecDeque<(u64, Op)>,
    sabotage: Option<Sabotage>,
    sabotaged: bool,
}

fn content(seed: u64, len: usize) -> Vec<u8> {
    match seed % 5 {
        0 => vec![0; len],
        1 => vec![(seed >> 8) as u8 | 1; len],
        _ => noise(seed, len),
    }
}

impl Fsx {
    fn new(place: Place, seed: u64) -> Self {
        Self {
            place,
            seeded: Seeded::new(seed),
            model: Vec::new(),
            handles: None,
            name: "memory",
            unsynced: false,
            epochs: BTreeMap::new(),
            pending: VecDeque::new(),
            committed: 0,
            last: VecDeque::new(),
            sabotage: None,
            sabotaged: false,
        }
    }

    fn path(&self) -> PathBuf {
        self.place.live().join(self.name)
    }

    fn open(&mut self) -> Check {
        let file = open(&self.path()).saying("open")?;
        let direct = open_direct(&self.path()).saying("open O_DIRECT")?;
        let map = Mapping::shared(&file, 0, LEN_MAX).saying("mmap")?;
        self.handles = Some(Handles { file, direct, map });
        Ok(())
    }

    /// Whether this is the moment for the planted fault.
    fn strikes(&mut self, sabotage: Sabotage) -> bool {
        let strikes = self.sabotage == Some(sabotage) && self.seeded.chance(500);
        self.sabotaged |= strikes;
        strikes
    }

    fn next_len(&mut self) -> usize {
        let max = match self.seeded.below(10) {
            0..=3 => PAGE,
            4..=7 => 16 * PAGE,
            8 => 64 * PAGE,
            _ => return PAGE * (1 + self.seeded.below(8) as usize),
        };
        1 + self.seeded.below(max as u64) as usize
    }

    /// A place for `len` bytes: mostly where the file is, sometimes past its end.
    fn next_at(&mut self, len: usize) -> usize {
        let past = if self.seeded.chance(100) { LEN_MAX } else { self.model.len() + 3 * PAGE };
        let at = self.seeded.below(past.min(LEN_MAX).saturating_sub(len).max(1) as u64) as usize;
        let at = if self.seeded.chance(300) { at / PAGE * PAGE } else { at };
        at.min(LEN_MAX - len)
    }

    fn next_op(&mut self) -> Op {
        let len = self.next_len();
        let at = self.next_at(len);
        let content = self.seeded.next();
        let chance = |seeded: &mut Seeded| seeded.chance(500);
        let to_sector = |number: usize| number.next_multiple_of(SECTOR);
        match self.seeded.below(1000) {
            0..150 => Op::Read { at, len },
            150..320 => Op::Write { at, len, content },
            320..390 => Op::DirectRead { at: at / SECTOR * SECTOR, len: to_sector(len) },
            390..470 => {
                let len = to_sector(len).min(LEN_MAX - at / SECTOR * SECTOR);
                Op::DirectWrite { at: at / SECTOR * SECTOR, len, content }
            }
            470..560 => Op::MapRead { at, len, fresh: chance(&mut self.seeded) },
            560..690 => {
                Op::MapWrite { at, len, content, fresh: chance(&mut self.seeded), sync: chance(&mut self.seeded) }
            }
            690..750 => {
                let len = match self.seeded.below(4) {
                    0 => self.model.len(),
                    1 => at / PAGE * PAGE,
                    _ => at,
                };
                Op::Truncate { len, by_path: chance(&mut self.seeded) }
            }
            750..830 => {
                let mode = [0, 1, 3, 3, 0x10, 0x11][self.seeded.below(6) as usize];
                Op::Allocate { mode, at, len }
            }
            830..860 => {
                let from = self.next_at(len);
                Op::Copy { from, to: at, len }
            }
            860..900 => Op::Sync { data_only: chance(&mut self.seeded) },
            900..945 => Op::CheckHoles { from: at },
            945..950 => Op::CheckAll,
            950..965 => Op::Reopen,
            965..975 => Op::Rename,
            975..979 => Op::Commit { by_command: self.seeded.chance(250) },
            979..984 => Op::CommitBehind,
            984..987 => Op::DropEpoch,
            987..996 => Op::CheckEpoch { by_map: chance(&mut self.seeded) },
            996..999 => Op::CheckAll,
            _ => Op::Restart,
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if self.model.len() < at + bytes.len() {
            self.model.resize(at + bytes.len(), 0);
        }
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn expected(&self, at: usize, len: usize) -> &[u8] {
        let end = self.model.len();
        &self.model[at.min(end)..(at + len).min(end)]
    }

    fn apply(&mut self, op: &Op) -> Check {
        let Some(handles) = self.handles.take() else { unreachable!() };
        let result = self.apply_with(op, &handles);
        self.handles = Some(handles);
        result
    }

    fn apply_with(&mut self, op: &Op, Handles { file, direct, map }: &Handles) -> Check {
        match *op {
            Op::Read { at, len } => {
                let mut found = vec![0xee; len];
                let count = file.read_at(&mut found, at as u64).saying("read")?;
                same("read", &found[..count], self.expected(at, len))?;
            }
            Op::Write { at, len, content: seed } => {
                let bytes = content(seed, len);
                if !self.strikes(Sabotage::LostWrite) || bytes.iter().all(|byte| *byte == 0) {
                    let count = file.write_at(&bytes, at as u64).saying("write")?;
                    must!(count == len, "write: {count} bytes instead of {len}");
                }
                self.put(at, &bytes);
            }
            Op::DirectRead { at, len } => {
                let mut found = Aligned::new(len);
                let count = direct.read_at(&mut found, at as u64).saying("read O_DIRECT")?;
                same("read O_DIRECT", &found[..count], self.expected(at, len))?;
            }
            Op::DirectWrite { at, len, content: seed } => {
                let bytes = Aligned::of(&content(seed, len));
                direct.write_all_at(&bytes, at as u64).saying("write O_DIRECT")?;
                self.put(at, &bytes);
            }
            Op::MapRead { at, len, fresh } => {
                let end = (at + len).min(self.model.len());
                if at >= end {
                    return Ok(());
                }
                let own = if fresh { Some(Mapping::shared(file, 0, end).saying("mmap")?) } else { None };
                // Where the file ends within a page, the rest of the page is zeros.
                let page_end = if end == self.model.len() { end.next_multiple_of(PAGE) } else { end };
                let found = match &own {
                    Some(own) => own.bytes(at..end),
                    None => map.bytes(at..page_end),
                };
                let found = found.saying("a load")?;
                same("a load", &found[..end - at], self.expected(at, len))?;
                must!(found[end - at..].iter().all(|byte| *byte == 0), "the last page has bytes behind the end");
            }
            Op::MapWrite { at, len, content: seed, fresh, sync } => {
                let bytes = content(seed, len);
                // A store needs the file to be there, as fsx does it.
                if self.model.len() < at + len {
                    file.set_len((at + len) as u64).saying("ftruncate")?;
                }
                self.put(at, &bytes);
                let own = if fresh { Some(Mapping::shared(file, 0, at + len).saying("mmap")?) } else { None };
                let used = own.as_ref().unwrap_or(map);
                if !self.strikes(Sabotage::LostStore) || bytes.iter().all(|byte| *byte == 0) {
                    used.write(at, &bytes).saying("a store")?;
                }
                if sync {
                    used.sync(at..at + len).saying("msync")?;
                } else {
                    self.unsynced = true;
                }
            }
            Op::Truncate { len, by_path } => {
                if by_path {
                    File::options().write(true).open(self.path()).and_then(|file| file.set_len(len as u64))
                } else {
                    file.set_len(len as u64)
                }
                .saying("truncate")?;
                let grown = self.model.len()..len;
                self.model.resize(len, 0);
                if self.strikes(Sabotage::WrongLength) {
                    file.set_len(len as u64 + 1).saying("sabotage")?;
                }
                if !grown.is_empty() && self.strikes(Sabotage::TailNotZeroed) {
                    file.write_all_at(b"x", grown.start as u64).saying("sabotage")?;
                }
            }
            Op::Allocate { mode, at, len } => {
                if !self.strikes(Sabotage::HoleNotPunched) {
                    let flags = FallocateFlags::from_bits_retain(mode);
                    fallocate(file, flags, at as u64, len as u64).saying("fallocate")?;
                }
                if matches!(mode, 3 | 0x10 | 0x11) {
                    let end = self.model.len();
                    self.model[at.min(end)..(at + len).min(end)].fill(0);
                }
                if mode & 1 == 0 && self.model.len() < at + len {
                    self.model.resize(at + len, 0);
                }
            }
            Op::Copy { from, to, len } => self.copy(file, from, to, len)?,
            Op::Sync { data_only } => {
                if data_only { file.sync_data() } else { file.sync_all() }.saying("fsync")?;
                self.unsynced = false;
            }
            Op::CheckHoles { from } => {
                self.sync(file)?;
                check_holes(file, &self.model, from as u64)?;
            }
            Op::CheckAll => same("the file", &fs::read(self.path()).saying("read")?, &self.model)?,
            Op::Commit { by_command } => self.commit(file, by_command)?,
            Op::CommitBehind => self.commit_behind(file)?,
            Op::DropEpoch => {
                if self.epochs.len() > 2 {
                    self.drop_oldest()?;
                }
            }
            Op::CheckEpoch { by_map } => {
                let which = self.seeded.below(self.epochs.len().max(1) as u64) as usize;
                if let Some((path, expected)) = self.epochs.values().nth(which) {
                    check_epoch(path, expected, by_map)?;
                }
            }
            Op::Reopen | Op::Rename | Op::Restart => unreachable!("done without handles"),
        }
        let len = file.metadata().saying("fstat")?.len();
        must!(len == self.model.len() as u64, "the file's length is {len} instead of {}", self.model.len());
        Ok(())
    }

    fn sync(&mut self, file: &File) -> Check {
        if std::mem::take(&mut self.unsynced) {
            file.sync_data().saying("fdatasync")?;
        }
        Ok(())
    }

    fn copy(&mut self, file: &File, from: usize, to: usize, len: usize) -> Check {
        let len = len.min(self.model.len().saturating_sub(from)).min(from.abs_diff(to)).min(LEN_MAX - to);
        let mut done = 0;
        while done < len {
            let (mut source, mut target) = ((from + done) as u64, (to + done) as u64);
            let count = rustix::fs::copy_file_range(file, Some(&mut source), file, Some(&mut target), len - done);
            let count = count.saying("copy_file_range")?;
            must!(count > 0, "copy_file_range copied {done} of {len} bytes");
            done += count;
        }
        let bytes = self.expected(from, len).to_vec();
        if !bytes.is_empty() {
            self.put(to, &bytes);
        }
        Ok(())
    }

    fn commit(&mut self, file: &File, by_command: bool) -> Check {
        self.committed += 1;
        let tag = format!("t{}", self.committed);
        let epoch = if by_command {
            self.unsynced = false;
            self.place.commit_by_command(&tag)?
        } else {
            self.sync(file)?;
            self.place.commit(&tag)?
        };
        let path = epoch.join(self.name);
        if !self.model.is_empty() && self.strikes(Sabotage::ChangedEpoch) {
            let mut bytes = fs::read(&path).saying("sabotage")?;
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&path, bytes).saying("sabotage")?;
        }
        self.epochs.insert(self.committed, (path, self.model.clone()));
        if self.epochs.len() > EPOCHS_MAX { self.drop_oldest() } else { Ok(()) }
    }

    /// Begins a commit, and goes on with the next operation while it is made.
    fn commit_behind(&mut self, file: &File) -> Check {
        if !self.place.is_mount() {
            return self.commit(file, false);
        }
        self.settle(PENDING_MAX - 1)?;
        self.sync(file)?;
        self.committed += 1;
        let epoch = self.place.epoch(&format!("t{}", self.committed));
        let path = epoch.join(self.name);
        let thread = std::thread::spawn(move || fs::create_dir(epoch));
        self.pending.push_back(Pending { number: self.committed, path, thread, moments: Vec::new() });
        Ok(())
    }

    /// Looks at commits that are done, and waits until at most so many are on their way.
    fn settle(&mut self, left: usize) -> Check {
        while let Some(pending) = self.pending.front() {
            let is_done = pending.thread.is_finished() || pending.moments.len() >= MOMENTS_MAX;
            if !is_done && self.pending.len() <= left {
                return Ok(());
            }
            let pending = self.pending.pop_front().expect("it was just looked at");
            pending.thread.join().map_err(|_| "mkdir panicked")?.saying(format!("mkdir epochs/t{}", pending.number))?;
            let found = fs::read(&pending.path).saying(pending.path.display())?;
            if !pending.moments.iter().any(|(_, moment)| **moment == found) {
                let differences: Vec<String> = pending
                    .moments
                    .iter()
                    .map(|(number, moment)| {
                        format!("after {number}: {}", difference(&found, moment).unwrap_or_default())
                    })
                    .collect();
                let path = pending.path.display();
                return Err(format!("{path} is what the file was at no moment:\n{}", differences.join("\n")));
            }
            self.epochs.insert(pending.number, (pending.path, found));
            if self.epochs.len() > EPOCHS_MAX {
                self.drop_oldest()?;
            }
        }
        Ok(())
    }

    /// What may be done while commits are on their way: whatever reaches the daemon by one request. The kernel cuts a write
    /// behind a page that it has not and that is not written whole, so that writes begin with a page here.
    fn during_commits(&mut self, op: Op) -> Check<Op> {
        if self.pending.is_empty() {
            return Ok(op);
        }
        let short = |len: usize| len.min(16 * PAGE);
        let write = |at: usize, len: usize, content: u64| Op::Write { at: at / PAGE * PAGE, len: short(len), content };
        Ok(match op {
            Op::MapWrite { at, len, content, .. } | Op::Write { at, len, content } => write(at, len, content),
            Op::Copy { to, len, .. } => write(to, len, 3),
            Op::DirectWrite { at, len, content } => Op::DirectWrite { at, len: short(len), content },
            Op::Rename | Op::Restart | Op::Commit { .. } => {
                self.settle(0)?;
                op
            }
            op => op,
        })
    }

    fn drop_oldest(&mut self) -> Check {
        let Some((number, (path, expected))) = self.epochs.pop_first() else { return Ok(()) };
        check_epoch(&path, &expected, false)?;
        self.place.drop_epoch(&format!("t{number}"))?;
        must!(!path.exists(), "{} was dropped and is there", path.display());
        Ok(())
    }

    fn step(&mut self, op: &Op) -> Check {
        match op {
            Op::Reopen => {
                self.handles = None;
                self.open()
            }
            Op::Rename => {
                let from = self.path();
                self.name = if self.name == "memory" { "mem.raw" } else { "memory" };
                rename(&from, &self.path()).saying("rename")
            }
            Op::Restart => {
                self.handles = None;
                self.unsynced = false;
                self.place.restart();
                if !self.model.is_empty() && self.strikes(Sabotage::LostAtRestart) {
                    open(&self.path()).and_then(|file| file.write_all_at(b"sabotage", 0)).saying("sabotage")?;
                }
                self.open()?;
                self.apply(&Op::CheckAll)
            }
            op => self.apply(op),
        }
    }

    fn run(&mut self, operations: u64) -> Check {
        self.open()?;
        for number in 0..operations {
            let op = self.next_op();
            let op = self.during_commits(op)?;
            self.last.push_back((number, op.clone()));
            if self.last.len() > 40 {
                self.last.pop_front();
            }
            self.step(&op).saying(format!("operation {number}, {op:?}"))?;
            if !self.pending.is_empty() {
                let now = Arc::new(self.model.clone());
                self.pending.iter_mut().for_each(|pending| pending.moments.push((number, now.clone())));
                self.settle(PENDING_MAX).saying(format!("operation {number}"))?;
            }
            self.place.beats().beat();
        }
        self.settle(0).saying("at the end")?;
        self.step(&Op::Restart).saying("at the end")?;
        for (path, expected) in self.epochs.values() {
            check_epoch(path, expected, true).saying("at the end")?;
        }
        self.handles = None;
        Ok(())
    }
}

/// An epoch holds what was committed, and its file cannot be written.
fn check_epoch(path: &PathBuf, expected: &[u8], by_map: bool) -> Check {
    let file = File::open(path).saying(path.display())?;
    let found = if by_map && !expected.is_empty() {
        let len = file.metadata().saying("fstat")?.len() as usize;
        must!(len == expected.len(), "{} has {len} bytes instead of {}", path.display(), expected.len());
        Mapping::private(&file, 0, len).and_then(|map| map.bytes(0..len)).saying(path.display())?
    } else {
        fs::read(path).saying(path.display())?
    };
    same(path.display(), &found, expected)?;
    check_holes(&file, expected, 0).saying(path.display())
}

/// What is said to be a hole reads as zeros, and both seeks agree with each other and with the end of the file.
fn check_holes(file: &File, model: &[u8], from: u64) -> Check {
    let end = model.len() as u64;
    let mut at = from;
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => end,
            Err(error) => return Err(format!("SEEK_DATA from {at}: {error}")),
        };
        must!(data >= at && data <= end, "SEEK_DATA from {at} says {data}, and the file ends at {end}");
        let hole = &model[at as usize..data as usize];
        must!(hole.iter().all(|byte| *byte == 0), "SEEK_DATA from {at} skips data before {data}");
        if data == end {
            break;
        }
        let hole = seek(file, SeekFrom::Hole(data)).saying("SEEK_HOLE")?;
        must!(hole > data && hole <= end, "SEEK_HOLE from {data} says {hole}, and the file ends at {end}");
        at = hole;
    }
    for whence in [SeekFrom::Data(end), SeekFrom::Hole(end)] {
        must!(seek(file, whence) == Err(Errno::NXIO), "{whence:?} at the end does not fail with ENXIO");
    }
    Ok(())
}

fn fails_with_its_last_operations(fsx: &Fsx, seed: u64, wrong: &str) -> ! {
    let last: Vec<String> = fsx.last.iter().map(|(number, op)| format!("  {number}: {op:?}")).collect();
    panic!("EPOCHFS_SEED={seed}: {wrong}; the last operations:\n{}", last.join("\n"));
}

fn run_in(place: Place, seed: u64, operations: u64) {
    let mut fsx = Fsx::new(place, seed);
    if let Err(wrong) = fsx.run(operations) {
        fails_with_its_last_operations(&fsx, seed, &wrong);
    }
    assert!(fsx.committed > 5 && !fsx.epochs.is_empty(), "{} commits", fsx.committed);
    fsx.place.finish();
}

#[test]
fn fsx_a_file_holds_what_was_written_across_commits_and_restarts() {
    let Some(place) = Place::new("fsx_a_file_holds_what_was_written") else { return };
    run_in(place, seed(), if is_long() { 1_000_000 } else { 4_000 });
}

/// What fsx expects is what ext4 does.
#[test]
fn fsx_expects_what_holds_in_a_plain_directory() {
    run_in(Place::plain("fsx_expects_what_holds_in_a_plain_directory"), seed(), 3_000);
}

#[test]
fn canary_fsx_notices_each_planted_fault() {
    use Sabotage::*;
    for sabotage in [LostWrite, LostStore, TailNotZeroed, WrongLength, HoleNotPunched, ChangedEpoch, LostAtRestart] {
        let mut fsx = Fsx::new(Place::plain("canary_fsx"), 7);
        fsx.sabotage = Some(sabotage);
        let result = fsx.run(2_500);
        assert!(fsx.sabotaged, "{sabotage:?} never struck");
        let noticed = result.expect_err("a planted fault went unnoticed");
        eprintln!("{sabotage:?}: {noticed}");
    }
}
