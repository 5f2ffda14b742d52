//! Random operations on names and metadata, done alike in the mount's live directory and in a directory on ext4, and
//! compared: the error of each call, what it tells, and every so often the whole tree.
//!
//! Hard links and special files are refused on the mount and not generated. Not compared, because filesystems differ
//! rightly: a directory's length and link count, blocks, and times that were not set by the test.

use std::collections::VecDeque;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use epochfs::platform::random::Seeded;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Stat, UTIME_NOW, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use crate::differential_tree::{Tree, compare_trees, shown};
use crate::must;
use crate::place::Place;
use crate::support::{Check, Saying, is_long, is_root, noise, seed};

const SLOTS: usize = 6;

/// A path below the root, as names.
type Names = Vec<Vec<u8>>;

#[derive(Clone, Debug)]
pub enum Op {
    Open {
        slot: usize,
        path: Names,
        flags: OFlags,
        mode: u32,
    },
    Close {
        slot: usize,
    },
    Mkdir {
        path: Names,
        mode: u32,
    },
    Rmdir {
        path: Names,
    },
    Unlink {
        path: Names,
    },
    Rename {
        from: Names,
        to: Names,
        flags: RenameFlags,
    },
    Symlink {
        target: Vec<u8>,
        path: Names,
    },
    Readlink {
        path: Names,
    },
    Chmod {
        path: Names,
        mode: u32,
    },
    Chown {
        path: Names,
        user: Option<u32>,
        group: Option<u32>,
        follow: bool,
    },
    Times {
        path: Names,
        atime: (i64, i64),
        mtime: (i64, i64),
        follow: bool,
    },
    Truncate {
        path: Names,
        len: u64,
    },
    SetAttribute {
        path: Names,
        name: &'static str,
        value: Vec<u8>,
        flags: XattrFlags,
    },
    GetAttribute {
        path: Names,
        name: &'static str,
    },
    RemoveAttribute {
        path: Names,
        name: &'static str,
    },
    ListAttributes {
        path: Names,
    },
    List {
        path: Names,
    },
    Stat {
        path: Names,
        follow: bool,
    },
    Write {
        slot: usize,
        at: u64,
        bytes: Vec<u8>,
    },
    /// At the file's position, or at the end with O_APPEND.
    WriteOn {
        slot: usize,
        bytes: Vec<u8>,
    },
    Read {
        slot: usize,
        at: u64,
        len: usize,
    },
    TruncateOpen {
        slot: usize,
        len: u64,
    },
    Allocate {
        slot: usize,
        mode: u32,
        at: u64,
        len: u64,
    },
    ChmodOpen {
        slot: usize,
        mode: u32,
    },
    Fstat {
        slot: usize,
    },
    Sync {
        slot: usize,
    },
}

/// What a call came to: what it told, or its error.
type Outcome = Result<Vec<u8>, Errno>;

/// One of the two directories.
struct Side {
    root: PathBuf,
    slots: [Option<OwnedFd>; SLOTS],
}

fn mode(mode: u32) -> Mode {
    Mode::from_bits_retain(mode)
}

fn follow(follow: bool) -> AtFlags {
    if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW }
}

/// What two stats must agree in.
fn told(stat: &Stat, times: bool) -> Vec<u8> {
    let kind = stat.st_mode & 0o170_000;
    let is_directory = kind == 0o040_000;
    let (links, len) = if is_directory { (0, 0) } else { (stat.st_nlink, stat.st_size) };
    let mut text =
        format!("mode {:o} links {links} user {} group {} len {len}", stat.st_mode, stat.st_uid, stat.st_gid);
    if times {
        text += &format!(" mtime {}.{:09}", stat.st_mtime, stat.st_mtime_nsec);
    }
    text.into_bytes()
}

impl Side {
    fn new(root: PathBuf) -> Self {
        Self { root, slots: Default::default() }
    }

    fn at(&self, names: &Names) -> PathBuf {
        let mut path = self.root.clone();
        names.iter().for_each(|name| path.push(std::ffi::OsStr::from_bytes(name)));
        path
    }

    fn slot(&self, slot: usize) -> Result<&OwnedFd, Errno> {
        self.slots[slot].as_ref().ok_or(Errno::BADF)
    }

    fn apply(&mut self, op: &Op) -> Outcome {
        use rustix::fs::*;
        let nothing = |()| Vec::new();
        match op {
            Op::Open { slot, path, flags, mode: bits } => {
                self.slots[*slot] = None;
                let file = open(self.at(path), *flags | OFlags::CLOEXEC, mode(*bits))?;
                let told = told(&fstat(&file)?, false);
                self.slots[*slot] = Some(file);
                Ok(told)
            }
            Op::Close { slot } => {
                self.slots[*slot] = None;
                Ok(Vec::new())
            }
            Op::Mkdir { path, mode: bits } => mkdir(self.at(path), mode(*bits)).map(nothing),
            Op::Rmdir { path } => rmdir(self.at(path)).map(nothing),
            Op::Unlink { path } => unlink(self.at(path)).map(nothing),
            Op::Rename { from, to, flags } => renameat_with(CWD, self.at(from), CWD, self.at(to), *flags).map(nothing),
            Op::Symlink { target, path } => symlink(std::ffi::OsStr::from_bytes(target), self.at(path)).map(nothing),
            Op::Readlink { path } => readlink(self.at(path), Vec::new()).map(|target| target.into_bytes()),
            Op::Chmod { path, mode: bits } => chmod(self.at(path), mode(*bits)).map(nothing),
            Op::Chown { path, user, group, follow: follows } => {
                let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
                chownat(CWD, self.at(path), user, group, follow(*follows)).map(nothing)
            }
            Op::Times { path, atime, mtime, follow: follows } => {
                let time = |(tv_sec, tv_nsec): (i64, i64)| Timespec { tv_sec, tv_nsec };
                let times = Timestamps { last_access: time(*atime), last_modification: time(*mtime) };
                utimensat(CWD, self.at(path), &times, follow(*follows))?;
                let is_set = |(_, nsec): (i64, i64)| nsec != UTIME_NOW && nsec != UTIME_OMIT;
                let stat = statat(CWD, self.at(path), follow(*follows))?;
                let mut text = told(&stat, is_set(*mtime));
                if is_set(*atime) {
                    text.extend(format!(" atime {}.{:09}", stat.st_atime, stat.st_atime_nsec).bytes());
                }
                Ok(text)
            }
            Op::Truncate { path, len } => {
                let file = open(self.at(path), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
                ftruncate(&file, *len).map(nothing)
            }
            Op::SetAttribute { path, name, value, flags } => {
                lsetxattr(self.at(path), *name, value, *flags).map(nothing)
            }
            Op::GetAttribute { path, name } => {
                let mut value = vec![0; 1024];
                let len = lgetxattr(self.at(path), *name, &mut value[..])?;
                value.truncate(len);
                Ok(value)
            }
            Op::RemoveAttribute { path, name } => lremovexattr(self.at(path), *name).map(nothing),
            Op::ListAttributes { path } => {
                let mut list = vec![0; 4096];
                let len = llistxattr(self.at(path), &mut list[..])?;
                list.truncate(len);
                let mut names: Vec<&[u8]> = list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
                names.retain(|name| name.starts_with(b"user.") && !name.starts_with(b"user.epochfs."));
                names.sort();
                Ok(names.join(&b' '))
            }
            Op::List { path } => {
                let directory =
                    open(self.at(path), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
                let mut names = Vec::new();
                for entry in Dir::new(directory)? {
                    let entry = entry?;
                    names.push([entry.file_name().to_bytes(), format!(" {:?}", entry.file_type()).as_bytes()].concat());
                }
                names.sort();
                Ok(names.join(&b'\n'))
            }
            Op::Stat { path, follow: follows } => {
                statat(CWD, self.at(path), follow(*follows)).map(|stat| told(&stat, false))
            }
            Op::Write { slot, at, bytes } => {
                rustix::io::pwrite(self.slot(*slot)?, bytes, *at).map(|count| count.to_string().into_bytes())
            }
            Op::WriteOn { slot, bytes } => {
                rustix::io::write(self.slot(*slot)?, bytes).map(|count| count.to_string().into_bytes())
            }
            Op::Read { slot, at, len } => {
                let mut bytes = vec![0; *len];
                let count = rustix::io::pread(self.slot(*slot)?, &mut bytes[..], *at)?;
                bytes.truncate(count);
                Ok(bytes)
            }
            Op::TruncateOpen { slot, len } => ftruncate(self.slot(*slot)?, *len).map(nothing),
            Op::Allocate { slot, mode, at, len } => {
                fallocate(self.slot(*slot)?, FallocateFlags::from_bits_retain(*mode), *at, *len).map(nothing)
            }
            Op::ChmodOpen { slot, mode: bits } => fchmod(self.slot(*slot)?, mode(*bits)).map(nothing),
            Op::Fstat { slot } => fstat(self.slot(*slot)?).map(|stat| told(&stat, false)),
            Op::Sync { slot } => fsync(self.slot(*slot)?).map(nothing),
        }
    }
}

/// A planted fault: what one side does instead, if the operation is of its kind.
type Sabotage = fn(&Op) -> Option<Op>;

struct Differential {
    place: Place,
    seeded: Seeded,
    sides: [Side; 2],
    last: VecDeque<Op>,
    epochs: Vec<(String, Tree)>,
    /// Paths that are there, or were a moment ago.
    known: Vec<Names>,
    sabotage: Option<Sabotage>,
    /// Calls that succeeded on both sides, to see that the run did something.
    succeeded: u64,
}

const ATTRIBUTES: [&str; 4] = ["user.a", "user.b", "user.a-longer-name", "user.\u{fc}ml\u{e4}ut"];

impl Differential {
    fn new(place: Place, twin: &Path, seed: u64) -> Self {
        let live = place.live();
        Self {
            place,
            seeded: Seeded::new(seed),
            sides: [Side::new(live), Side::new(twin.to_owned())],
            last: VecDeque::new(),
            epochs: Vec::new(),
            known: Vec::new(),
            sabotage: None,
            succeeded: 0,
        }
    }

    fn name(&mut self) -> Vec<u8> {
        match self.seeded.below(80) {
            0 => vec![b'n'; 255],
            1 => vec![b'n'; 256],
            2 => b"new\nline \\ * ? \" '".to_vec(),
            3 => vec![0xff, 0xfe, b'x', 0x80],
            4 => "\u{fc}ml\u{e4}ut".into(),
            number => vec![b'a' + (number % 6) as u8],
        }
    }

    /// A path: often one that is there, or a new name beside or below it; few different names, so that operations meet.
    fn names(&mut self) -> Names {
        if !self.known.is_empty() && self.seeded.chance(700) {
            let mut names = self.known[self.seeded.below(self.known.len() as u64) as usize].clone();
            match self.seeded.below(6) {
                0 => drop(names.pop()),
                1 if names.len() < 4 => {}
                _ => return names,
            }
            names.push(self.name());
            return names;
        }
        let depth = [1, 1, 1, 2, 2, 3][self.seeded.below(6) as usize];
        (0..depth).map(|_| self.name()).collect()
    }

    /// Whoever is not root must be able to look at what is there.
    fn mode(&mut self) -> u32 {
        let least = if is_root() { 0 } else { 0o700 };
        least
            | match self.seeded.below(4) {
                0 => 0o644,
                1 => 0o755,
                2 => self.seeded.below(0o1000) as u32,
                _ => self.seeded.below(0o10000) as u32,
            }
    }

    fn time(&mut self) -> (i64, i64) {
        match self.seeded.below(8) {
            0 => (0, UTIME_NOW),
            1 => (0, UTIME_OMIT),
            2 => (self.seeded.below(1 << 33) as i64, self.seeded.below(1_000_000_000) as i64),
            _ => (self.seeded.below(1 << 31) as i64, self.seeded.below(1_000_000_000) as i64),
        }
    }

    fn len(&mut self) -> u64 {
        let max = [100, 5_000, 70_000][self.seeded.below(3) as usize];
        self.seeded.below(max)
    }

    fn open_op(&mut self, slot: usize) -> Op {
        let access = [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR, OFlags::RDWR][self.seeded.below(4) as usize];
        let mut flags = access;
        for (flag, per_mille) in [
            (OFlags::CREATE, 600),
            (OFlags::EXCL, 150),
            (OFlags::TRUNC, 200),
            (OFlags::APPEND, 200),
            (OFlags::NOFOLLOW, 100),
        ] {
            if self.seeded.chance(per_mille) {
                flags |= flag;
            }
        }
        // What EXCL without CREATE means is not defined.
        if !flags.contains(OFlags::CREATE) {
            flags -= OFlags::EXCL;
            if self.seeded.chance(100) {
                flags |= OFlags::DIRECTORY;
            }
        }
        Op::Open { slot, path: self.names(), flags, mode: self.mode() }
    }

    fn next_op(&mut self) -> Op {
        let slots = &self.sides[1].slots;
        let mut slot = self.seeded.below(SLOTS as u64) as usize;
        // Mostly one that is open.
        if let Some(open) = (0..SLOTS).map(|more| (slot + more) % SLOTS).find(|slot| slots[*slot].is_some())
            && self.seeded.chance(800)
        {
            slot = open;
        }
        let path = self.names();
        let even = self.seeded.chance(500);
        match self.seeded.below(100) {
            0..15 => self.open_op(slot),
            15..18 => Op::Close { slot },
            18..26 => Op::Mkdir { path, mode: self.mode() },
            26..30 => Op::Rmdir { path },
            30..35 => Op::Unlink { path },
            35..47 => {
                let flags = match self.seeded.below(5) {
                    0 => RenameFlags::NOREPLACE,
                    1 => RenameFlags::EXCHANGE,
                    _ => RenameFlags::empty(),
                };
                Op::Rename { from: path, to: self.names(), flags }
            }
            47..51 => {
                let target = match self.seeded.below(4) {
                    0 => b"does not exist".to_vec(),
                    1 => vec![b't'; 1 + self.seeded.below(3000) as usize],
                    _ => self.names().join(&b'/'),
                };
                Op::Symlink { target, path }
            }
            51..53 => Op::Readlink { path },
            53..57 => Op::Chmod { path, mode: self.mode() },
            57..60 if is_root() => {
                let id = |seeded: &mut Seeded| (!seeded.chance(300)).then(|| seeded.below(3) as u32 * 1000);
                // A chown to nobody and no group ends set-user-id on ext4; by FUSE the daemon is not asked to.
                let user = id(&mut self.seeded).unwrap_or(1000);
                Op::Chown { path, user: Some(user), group: id(&mut self.seeded), follow: even }
            }
            60..64 => Op::Times { path, atime: self.time(), mtime: self.time(), follow: even },
            64..67 => Op::Truncate { path, len: self.len() },
            67..71 => {
                let flags =
                    [XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE][self.seeded.below(3) as usize];
                let name = ATTRIBUTES[self.seeded.below(4) as usize];
                let len = self.seeded.below(300) as usize;
                Op::SetAttribute { path, name, value: noise(self.seeded.next(), len), flags }
            }
            71..73 => Op::GetAttribute { path, name: ATTRIBUTES[self.seeded.below(4) as usize] },
            73..75 => Op::RemoveAttribute { path, name: ATTRIBUTES[self.seeded.below(4) as usize] },
            75..77 => Op::ListAttributes { path },
            77..80 => Op::List { path },
            80..83 => Op::Stat { path, follow: even },
            83..87 => {
                let len = self.len() as usize;
                Op::Write { slot, at: self.len(), bytes: noise(self.seeded.next(), len) }
            }
            87..90 => {
                let len = self.len() as usize;
                Op::WriteOn { slot, bytes: noise(self.seeded.next(), len) }
            }
            90..93 => Op::Read { slot, at: self.len(), len: self.len() as usize },
            93..94 => Op::TruncateOpen { slot, len: self.len() },
            94..96 => {
                let mode = [0, 1, 3, 0x10, 0x11][self.seeded.below(5) as usize];
                Op::Allocate { slot, mode, at: self.len(), len: self.len() }
            }
            96..97 => Op::ChmodOpen { slot, mode: self.mode() },
            97..99 => Op::Fstat { slot },
            _ => Op::Sync { slot },
        }
    }

    fn step(&mut self, op: &Op) -> Check {
        let instead = self.sabotage.and_then(|sabotage| sabotage(op));
        let found = self.sides[0].apply(instead.as_ref().unwrap_or(op));
        let expected = self.sides[1].apply(op);
        self.succeeded += u64::from(expected.is_ok());
        if let (Ok(_), Op::Open { path, .. } | Op::Mkdir { path, .. } | Op::Rename { to: path, .. }) = (&expected, op) {
            self.known.push(path.clone());
        }
        let text = |outcome: &Outcome| match outcome {
            Ok(told) => format!("Ok({})", shown(told)),
            Err(error) => format!("{error:?}"),
        };
        must!(found == expected, "{} instead of {}", text(&found), text(&expected));
        Ok(())
    }

    fn compare(&mut self) -> Check {
        let expected = Tree::read(&self.sides[1].root)?;
        compare_trees(&Tree::read(&self.sides[0].root)?, &expected)?;
        self.known =
            expected.paths().map(|path| path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect()).collect();
        Ok(())
    }

    fn commit(&mut self) -> Check {
        let tag = format!("t{}", self.epochs.len());
        let epoch = self.place.commit(&tag)?;
        let mut tree = Tree::read(&self.sides[1].root)?;
        if self.place.is_mount() {
            tree.is_of_an_epoch();
        } else {
            // The imitation copies neither owners nor attributes.
            tree = Tree::read(&epoch)?;
        }
        compare_trees(&Tree::read(&epoch)?, &tree)?;
        self.epochs.push((tag, tree));
        Ok(())
    }

    fn restart(&mut self) -> Check {
        self.sides.iter_mut().for_each(|side| side.slots = Default::default());
        let before = Tree::read(&self.sides[0].root)?.with_times();
        self.place.restart();
        compare_trees(&Tree::read(&self.sides[0].root)?.with_times(), &before).saying("after a restart")
    }

    fn run(&mut self, operations: u64) -> Check {
        for number in 0..operations {
            let op = self.next_op();
            self.last.push_back(op.clone());
            if self.last.len() > 40 {
                self.last.pop_front();
            }
            let what = || format!("operation {number}");
            self.step(&op).saying(what())?;
            if number % compared_every() == 0 {
                self.compare().saying(what())?;
            }
            if number % 500 == 499 {
                self.commit().saying(what())?;
            }
            if number % 1500 == 1499 {
                self.restart().saying(what())?;
            }
            self.place.beats().beat();
        }
        self.compare().saying("at the end")?;
        for (tag, expected) in &self.epochs {
            compare_trees(&Tree::read(&self.place.epoch(tag))?, expected).saying(format!("{tag} at the end"))?;
        }
        Ok(())
    }
}

/// After so many operations the trees are compared. `EPOCHFS_COMPARE_EVERY=1` finds the first operation that went wrong.
fn compared_every() -> u64 {
    std::env::var("EPOCHFS_COMPARE_EVERY").ok().and_then(|every| every.parse().ok()).unwrap_or(100)
}

/// An operation without the bytes that nobody wants to read.
fn describe(op: &Op) -> String {
    match op {
        Op::Write { slot, at, bytes } => format!("Write {{ slot: {slot}, at: {at}, {} bytes }}", bytes.len()),
        Op::WriteOn { slot, bytes } => format!("WriteOn {{ slot: {slot}, {} bytes }}", bytes.len()),
        Op::SetAttribute { path, name, value, flags } => {
            format!("SetAttribute {{ {:?}, {name}, {} bytes, {flags:?} }}", shown(&path.join(&b'/')), value.len())
        }
        Op::Open { slot, path, flags, mode } => {
            format!("Open {{ slot: {slot}, {:?}, {flags:?}, {mode:o} }}", shown(&path.join(&b'/')))
        }
        Op::Rename { from, to, flags } => {
            format!("Rename {{ {:?} to {:?}, {flags:?} }}", shown(&from.join(&b'/')), shown(&to.join(&b'/')))
        }
        other => format!("{other:?}"),
    }
}

fn run_in(place: Place, seed: u64, operations: u64) {
    let twin = tempfile::tempdir().unwrap();
    let mut differential = Differential::new(place, twin.path(), seed);
    if let Err(wrong) = differential.run(operations) {
        let last: Vec<String> = differential.last.iter().map(|op| format!("  {}", describe(op))).collect();
        panic!("EPOCHFS_SEED={seed}: {wrong}; the last operations:\n{}", last.join("\n"));
    }
    let succeeded = differential.succeeded;
    assert!(succeeded * 4 > operations, "only {succeeded} of {operations} calls succeeded");
    differential.place.finish();
}

#[test]
fn differential_live_does_what_ext4_does() {
    let Some(place) = Place::new("differential_live_does_what_ext4_does") else { return };
    run_in(place, seed(), if is_long() { 200_000 } else { 6_000 });
}

#[test]
fn canary_differential_notices_each_planted_fault() {
    let faults: [(&str, Sabotage); 11] = [
        ("a chmod that does nothing", |op| match op {
            Op::Chmod { path, .. } => Some(Op::Stat { path: path.clone(), follow: true }),
            _ => None,
        }),
        ("a rename that replaces where it must not", |op| match op {
            Op::Rename { from, to, flags: RenameFlags::NOREPLACE } if from != to => {
                Some(Op::Rename { from: from.clone(), to: to.clone(), flags: RenameFlags::EXCHANGE })
            }
            _ => None,
        }),
        ("a length that is wrong by one", |op| match op {
            Op::Truncate { path, len } => Some(Op::Truncate { path: path.clone(), len: len + 1 }),
            _ => None,
        }),
        ("a time that is wrong by a nanosecond", |op| match op {
            Op::Times { path, atime, mtime, follow } if mtime.1 < 999_999_999 => {
                let mtime = (mtime.0, mtime.1 + 1);
                Some(Op::Times { path: path.clone(), atime: *atime, mtime, follow: *follow })
            }
            _ => None,
        }),
        ("an attribute with another value", |op| match op {
            Op::SetAttribute { path, name, flags, value } => {
                let value = [value.as_slice(), b"x"].concat();
                Some(Op::SetAttribute { path: path.clone(), name, value, flags: *flags })
            }
            _ => None,
        }),
        ("an unlink that leaves the file", |op| match op {
            Op::Unlink { path } => Some(Op::Stat { path: path.clone(), follow: false }),
            _ => None,
        }),
        ("a write that loses its last byte", |op| match op {
            Op::Write { slot, at, bytes } if bytes.len() > 1 => {
                Some(Op::Write { slot: *slot, at: *at, bytes: bytes[1..].to_vec() })
            }
            _ => None,
        }),
        ("a directory with another mode", |op| match op {
            Op::Mkdir { path, mode } => Some(Op::Mkdir { path: path.clone(), mode: mode ^ 0o100 }),
            _ => None,
        }),
        ("an open that does not truncate", |op| match op {
            Op::Open { slot, path, flags, mode } if flags.contains(OFlags::TRUNC) && flags.contains(OFlags::RDWR) => {
                Some(Op::Open { slot: *slot, path: path.clone(), flags: *flags - OFlags::TRUNC, mode: *mode })
            }
            _ => None,
        }),
        ("another target of a link", |op| match op {
            Op::Symlink { target, path } => {
                Some(Op::Symlink { target: [target.as_slice(), b"x"].concat(), path: path.clone() })
            }
            _ => None,
        }),
        ("a directory that is not removed", |op| match op {
            Op::Rmdir { path } => Some(Op::Stat { path: path.clone(), follow: false }),
            _ => None,
        }),
    ];
    for (name, sabotage) in faults {
        let twin = tempfile::tempdir().unwrap();
        let mut differential = Differential::new(Place::plain("canary_differential"), twin.path(), 3);
        differential.sabotage = Some(sabotage);
        let result = differential.run(2_000);
        let noticed = result.expect_err(name);
        eprintln!("{name}: {}", noticed.lines().next().unwrap_or_default());
    }
}
