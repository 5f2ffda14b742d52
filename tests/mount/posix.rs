//! Selected cases of POSIX, after those of pjdfstest, by hand. Each runs in a directory of its own, on ext4 (which proves
//! the case) and on a mount with `--allow-other`.
//!
//! Here are names, structure, opening, renaming, removing and listing; `posix_rights.rs` has permissions, `posix_times.rs` has
//! times.
//!
//! Left out, with the reason:
//! - hard links, fifos, sockets and devices: refused by design, which is tested here instead;
//! - chflags, NFSv4 and POSIX ACLs, and `O_SHLOCK`: not of Linux, or not offered;
//! - `posix_fallocate` and contents of files: `fsx.rs` and `differential.rs`;
//! - umask: applied by the kernel before the daemon sees a mode, and shared by all threads of the test;
//! - times of the last access: not kept by themselves, as with `noatime`; those that are set are kept until the daemon ends;
//! - ENOSPC and EROFS: `full.rs` and `epochs.rs`;
//! - EFBIG and ETXTBSY: limits of the kernel's, not of the mount's; EXDEV cannot be had within one machine;
//! - EFAULT, EIO and ENFILE: of the kernel, or not to be produced by a test.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, open, renameat_with};
use rustix::io::Errno;

use crate::fixture::{Mount, Options};
use crate::place::Place;
use crate::support::{fails, is_root, rename};

/// A case: its name, and what it does in an empty directory.
pub type Case = (&'static str, fn(&Path));

/// Runs every case in a directory of its own, and fails with the names of all that failed.
pub fn run_cases(base: &Path, cases: &[Case], beat: &dyn Fn()) {
    let mut failed = Vec::new();
    for (name, case) in cases {
        let directory = base.join(name.replace(' ', "_"));
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| case(&directory))) {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            failed.push(format!("{name}: {}", text.unwrap_or_default()));
        }
        beat();
    }
    assert!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

/// Runs the cases in a plain directory that everybody may pass through.
pub fn run_on_ext4(cases: &[Case]) {
    let place = Place::plain("posix_on_ext4");
    fs::set_permissions(place.root(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    run_cases(&place.live(), cases, &|| place.beats().beat());
}

pub fn run_on_a_mount(test: &str, cases: &[Case]) {
    // Only root can become others, and lets them in without being allowed to by /etc/fuse.conf.
    let options = if is_root() { Options::arguments(&["--allow-other"]) } else { Options::default() };
    let Some(mount) = Mount::with(test, options) else { return };
    let live = mount.make_machine("posix");
    run_cases(&live, cases, &|| mount.beat());
    // What all the cases left is committed, and what is committed is whole.
    mount.commit("posix", "all").unwrap();
    mount.finish();
}

fn file(path: &Path, text: &str) -> PathBuf {
    fs::write(path, text).unwrap();
    path.to_owned()
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Errno> {
    renameat_with(CWD, from, CWD, to, flags)
}

fn listed(directory: &Path) -> Vec<Vec<u8>> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_vec()).collect();
    names.sort();
    names
}

/// Every call that takes a path, and its name.
fn calls_on(path: &Path, other: &Path) -> Vec<(&'static str, Result<(), std::io::Error>)> {
    let all = |result: Result<(), Errno>| result.map_err(std::io::Error::from);
    vec![
        ("open", File::open(path).map(drop)),
        ("create", File::options().write(true).create(true).truncate(false).open(path).map(drop)),
        ("mkdir", fs::create_dir(path)),
        ("rmdir", fs::remove_dir(path)),
        ("unlink", all(rustix::fs::unlink(path))),
        ("stat", fs::metadata(path).map(drop)),
        ("lstat", fs::symlink_metadata(path).map(drop)),
        ("readlink", fs::read_link(path).map(drop)),
        ("symlink", symlink("target", path)),
        ("chmod", all(rustix::fs::chmod(path, Mode::RWXU))),
        ("chown", std::os::unix::fs::chown(path, None, None)),
        ("rename from", rename(path, other)),
        ("rename to", rename(other, path)),
        ("listxattr", all(rustix::fs::listxattr(path, &mut [0_u8; 64][..]).map(drop))),
        ("access", all(rustix::fs::access(path, rustix::fs::Access::EXISTS))),
        ("opendir", fs::read_dir(path).map(drop)),
    ]
}

const CASES: [Case; 32] = [
    ("names of 255 bytes are taken, longer ones not", |base| {
        let long = base.join("n".repeat(255));
        file(&long, "content");
        assert_eq!(text(&long), "content");
        let longer = base.join("m".repeat(255));
        rename(&long, &longer).unwrap();
        fs::create_dir(&long).unwrap();
        fs::remove_dir(&long).unwrap();
        symlink("m".repeat(255), &long).unwrap();
        assert_eq!(text(&long), "content");
        assert_eq!(listed(base).len(), 2);
        for (name, result) in calls_on(&base.join("n".repeat(256)), &longer) {
            fails(name, result, &[Errno::NAMETOOLONG]);
        }
    }),
    ("paths of 4096 bytes are too long", |base| {
        let long = base.join("d/".repeat(2048));
        for (name, result) in calls_on(&long, &file(&base.join("other"), "")) {
            fails(name, result, &[Errno::NAMETOOLONG]);
        }
    }),
    ("a name is any bytes", |base| {
        let mut names: Vec<Vec<u8>> =
            (1..=255_u8).filter(|byte| ![b'/', b'.'].contains(byte)).map(|byte| vec![byte]).collect();
        names.extend([
            b"new\nline".to_vec(),
            b"\xff\xfe\x80".to_vec(),
            b"...".to_vec(),
            b" leading and trailing ".to_vec(),
            b"-rf".to_vec(),
            b"%41@latest\\".to_vec(),
            "\u{fc}ml\u{e4}ut".into(),
            "u\u{308}mla\u{308}ut".into(),
        ]);
        for name in &names {
            let path = base.join(std::ffi::OsStr::from_bytes(name));
            fs::write(&path, name).unwrap();
        }
        names.sort();
        assert_eq!(listed(base), names);
        for name in &names {
            assert_eq!(fs::read(base.join(std::ffi::OsStr::from_bytes(name))).unwrap(), *name);
        }
    }),
    ("case matters", |base| {
        file(&base.join("name"), "lower");
        file(&base.join("NAME"), "upper");
        assert_eq!((text(&base.join("name")), text(&base.join("NAME"))), ("lower".into(), "upper".into()));
    }),
    ("what does not exist is not found", |base| {
        let other = file(&base.join("other"), "");
        for (name, result) in calls_on(&base.join("missing/name"), &other) {
            fails(name, result, &[Errno::NOENT]);
        }
        fails("an empty path", File::open(""), &[Errno::NOENT]);
    }),
    ("a file is no directory", |base| {
        file(&base.join("file"), "");
        let other = file(&base.join("other"), "");
        for (name, result) in calls_on(&base.join("file/name"), &other) {
            fails(name, result, &[Errno::NOTDIR]);
        }
        fails("rmdir", fs::remove_dir(base.join("file")), &[Errno::NOTDIR]);
        fails("opendir", fs::read_dir(base.join("file")), &[Errno::NOTDIR]);
        fails("a slash behind it", File::open(base.join("file/")), &[Errno::NOTDIR]);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        fails("O_DIRECTORY", open(base.join("file"), flags, Mode::empty()), &[Errno::NOTDIR]);
    }),
    ("a directory is no file", |base| {
        let directory = base.join("directory");
        fs::create_dir(&directory).unwrap();
        for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::RDONLY | OFlags::TRUNC] {
            fails("open", open(&directory, flags, Mode::empty()), &[Errno::ISDIR]);
        }
        fails("create", File::create(&directory), &[Errno::ISDIR]);
        fails("unlink", fs::remove_file(&directory), &[Errno::ISDIR]);
        let opened = File::open(&directory).unwrap();
        fails("read", (&opened).read(&mut [0; 8]), &[Errno::ISDIR]);
        assert!(directory.is_dir());
    }),
    ("a directory with something in it is not removed", |base| {
        fs::create_dir_all(base.join("directory/sub")).unwrap();
        fails("rmdir", fs::remove_dir(base.join("directory")), &[Errno::NOTEMPTY, Errno::EXIST]);
        fs::remove_dir(base.join("directory/sub")).unwrap();
        symlink("nowhere", base.join("directory/link")).unwrap();
        fails("rmdir", fs::remove_dir(base.join("directory")), &[Errno::NOTEMPTY, Errno::EXIST]);
        fs::remove_file(base.join("directory/link")).unwrap();
        fs::remove_dir(base.join("directory")).unwrap();
        fails("rmdir", fs::remove_dir(base.join("directory")), &[Errno::NOENT]);
    }),
    ("dot and dot dot are not removed", |base| {
        fs::create_dir_all(base.join("directory/sub")).unwrap();
        fails("rmdir .", rustix::fs::rmdir(base.join("directory/.")), &[Errno::INVAL]);
        fails("rmdir ..", rustix::fs::rmdir(base.join("directory/sub/..")), &[Errno::NOTEMPTY, Errno::EXIST]);
        fails("rename .", rename(&base.join("directory/."), &base.join("new")), &[Errno::BUSY, Errno::INVAL]);
    }),
    ("what exists is not made again", |base| {
        file(&base.join("file"), "content");
        fs::create_dir(base.join("directory")).unwrap();
        symlink("nowhere", base.join("dangling")).unwrap();
        for name in ["file", "directory", "dangling"] {
            let path = base.join(name);
            fails("mkdir", fs::create_dir(&path), &[Errno::EXIST]);
            fails("symlink", symlink("target", &path), &[Errno::EXIST]);
            let exclusive = open(&path, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR, Mode::RWXU);
            fails("O_EXCL", exclusive, &[Errno::EXIST]);
        }
        assert_eq!(text(&base.join("file")), "content");
    }),
    ("loops of links are noticed", |base| {
        symlink("b", base.join("a")).unwrap();
        symlink("a", base.join("b")).unwrap();
        symlink("self/../self", base.join("self")).unwrap();
        for name in ["a", "self", "a/x"] {
            fails("open", File::open(base.join(name)), &[Errno::LOOP]);
            fails("stat", fs::metadata(base.join(name)), &[Errno::LOOP]);
            fails("chmod", rustix::fs::chmod(base.join(name), Mode::RWXU), &[Errno::LOOP]);
            fails("create", File::create(base.join(name)), &[Errno::LOOP]);
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
        fails("O_NOFOLLOW", open(base.join("a"), flags, Mode::empty()), &[Errno::LOOP]);
        assert_eq!(fs::read_link(base.join("a")).unwrap(), Path::new("b"));
    }),
    ("a link tells its target, and is followed", |base| {
        file(&base.join("file"), "content");
        for (name, target) in [("short", "file".to_owned()), ("long", format!("{}file", "./".repeat(2000)))] {
            let link = base.join(name);
            symlink(&target, &link).unwrap();
            assert_eq!(fs::read_link(&link).unwrap(), Path::new(&target));
            let status = fs::symlink_metadata(&link).unwrap();
            assert!(status.file_type().is_symlink() && status.len() == target.len() as u64);
            assert_eq!(text(&link), "content");
        }
        fails("readlink of a file", fs::read_link(base.join("file")), &[Errno::INVAL]);
        // Creating by a dangling link makes what it names.
        symlink("made", base.join("dangling")).unwrap();
        file(&base.join("dangling"), "new");
        assert_eq!(text(&base.join("made")), "new");
        fs::remove_file(base.join("dangling")).unwrap();
        assert_eq!(text(&base.join("made")), "new");
    }),
    ("O_TRUNC empties, and O_EXCL and O_CREAT make", |base| {
        let path = file(&base.join("file"), "content");
        let inode = fs::metadata(&path).unwrap().ino();
        let opened = File::open(&path).unwrap();
        File::options().write(true).truncate(true).open(&path).unwrap();
        assert_eq!((text(&path), fs::metadata(&path).unwrap().ino()), (String::new(), inode));
        assert_eq!(opened.metadata().unwrap().len(), 0);
        let made = base.join("made");
        let made_file: File = open(&made, OFlags::CREATE | OFlags::EXCL | OFlags::RDWR, Mode::RUSR).unwrap().into();
        // The one who creates it may write, though the mode forbids it.
        (&made_file).write_all(b"x").unwrap();
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o400);
    }),
    ("O_APPEND writes at the end, whoever wrote before", |base| {
        let path = file(&base.join("file"), "one ");
        let mut first = File::options().append(true).open(&path).unwrap();
        let mut second = File::options().append(true).open(&path).unwrap();
        first.write_all(b"two ").unwrap();
        second.write_all(b"three ").unwrap();
        first.seek(std::io::SeekFrom::Start(0)).unwrap();
        first.write_all(b"four").unwrap();
        assert_eq!(text(&path), "one two three four");
    }),
    ("a file opened one way is not used the other", |base| {
        let path = file(&base.join("file"), "content");
        let read = File::open(&path).unwrap();
        fails("write", read.write_at(b"x", 0), &[Errno::BADF]);
        fails("ftruncate", read.set_len(0), &[Errno::INVAL, Errno::BADF]);
        let write = File::options().write(true).open(&path).unwrap();
        fails("read", write.read_at(&mut [0; 8], 0), &[Errno::BADF]);
        assert_eq!(text(&path), "content");
    }),
    ("reads end at the end, and writes behind it leave zeros", |base| {
        let path = file(&base.join("file"), "content");
        let opened = File::options().read(true).write(true).open(&path).unwrap();
        let mut bytes = [0xee; 32];
        assert_eq!(opened.read_at(&mut bytes, 7).unwrap(), 0);
        assert_eq!(opened.read_at(&mut bytes, 1 << 40).unwrap(), 0);
        assert_eq!(opened.read_at(&mut bytes, 4).unwrap(), 3);
        assert_eq!(opened.write_at(b"", 100).unwrap(), 0);
        assert_eq!(opened.metadata().unwrap().len(), 7);
        opened.write_all_at(b"end", 10_000).unwrap();
        let found = fs::read(&path).unwrap();
        assert!(found[..7] == *b"content" && found[7..10_000].iter().all(|byte| *byte == 0) && found.ends_with(b"end"));
        // Cut and grown again, what was cut is gone.
        opened.set_len(3).unwrap();
        opened.set_len(7).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"con\0\0\0\0");
    }),
    ("sparse files are as long as they are said to be", |base| {
        let opened = File::create_new(base.join("sparse")).unwrap();
        opened.set_len(1 << 42).unwrap();
        opened.write_all_at(b"x", (1 << 42) - 1).unwrap();
        let status = opened.metadata().unwrap();
        assert_eq!(status.len(), 1 << 42);
        assert!(status.blocks() < 1 << 20, "{} blocks", status.blocks());
        let mut byte = [0];
        File::open(base.join("sparse")).unwrap().read_exact_at(&mut byte, (1 << 42) - 1).unwrap();
        assert_eq!(byte, *b"x");
    }),
    ("a rename replaces a file, and who has it open keeps it", |base| {
        let (from, to) = (file(&base.join("from"), "new"), file(&base.join("to"), "old"));
        let (inode, open_old) = (fs::metadata(&from).unwrap().ino(), File::open(&to).unwrap());
        let mut open_new = File::open(&from).unwrap();
        rename(&from, &to).unwrap();
        assert!(!from.exists() && text(&to) == "new" && fs::metadata(&to).unwrap().ino() == inode);
        assert_eq!(open_old.metadata().unwrap().nlink(), 0);
        let mut bytes = [0; 3];
        open_old.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, *b"old");
        let mut found = String::new();
        open_new.read_to_string(&mut found).unwrap();
        assert_eq!((found.as_str(), open_new.metadata().unwrap().nlink()), ("new", 1));
    }),
    ("a rename to itself does nothing", |base| {
        let path = file(&base.join("file"), "content");
        rename(&path, &path).unwrap();
        assert_eq!(text(&path), "content");
        fs::create_dir(base.join("directory")).unwrap();
        rename(&base.join("directory"), &base.join("directory")).unwrap();
        fails("exchange with nothing", rename_with(&path, &base.join("x"), RenameFlags::EXCHANGE), &[Errno::NOENT]);
    }),
    ("a directory is not renamed into itself", |base| {
        fs::create_dir_all(base.join("a/b/c")).unwrap();
        for to in ["a/x", "a/b/x", "a/b/c/x", "a/b"] {
            fails(to, rename(&base.join("a"), &base.join(to)), &[Errno::INVAL]);
        }
        fails("over its parent", rename(&base.join("a/b/c"), &base.join("a")), &[Errno::NOTEMPTY, Errno::EXIST]);
        let swapped = rename_with(&base.join("a"), &base.join("a/b"), RenameFlags::EXCHANGE);
        fails("exchange", swapped, &[Errno::INVAL]);
        rename(&base.join("a/b"), &base.join("b")).unwrap();
        assert!(base.join("b/c").is_dir() && listed(&base.join("a")).is_empty());
    }),
    ("a rename replaces only its like", |base| {
        let path = file(&base.join("file"), "content");
        fs::create_dir_all(base.join("full/sub")).unwrap();
        fs::create_dir(base.join("empty")).unwrap();
        fails("file over directory", rename(&path, &base.join("empty")), &[Errno::ISDIR]);
        fails("directory over file", rename(&base.join("empty"), &path), &[Errno::NOTDIR]);
        let over_full = rename(&base.join("empty"), &base.join("full"));
        fails("directory over a full one", over_full, &[Errno::NOTEMPTY, Errno::EXIST]);
        rename(&base.join("full"), &base.join("empty")).unwrap();
        assert!(base.join("empty/sub").is_dir() && !base.join("full").exists());
        symlink("file", base.join("link")).unwrap();
        rename(&base.join("link"), &path).unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("file"));
    }),
    ("a renamed directory takes all below along", |base| {
        fs::create_dir_all(base.join("a/b")).unwrap();
        let deep = File::create_new(base.join("a/b/file")).unwrap();
        fs::create_dir(base.join("c")).unwrap();
        rename(&base.join("a"), &base.join("c/d")).unwrap();
        deep.write_all_at(b"after", 0).unwrap();
        assert_eq!(text(&base.join("c/d/b/file")), "after");
        assert_eq!(fs::canonicalize(base.join("c/d/b/..")).unwrap(), fs::canonicalize(base.join("c/d")).unwrap());
        assert_eq!(fs::metadata(base.join("c/d/..")).unwrap().ino(), fs::metadata(base.join("c")).unwrap().ino());
    }),
    ("NOREPLACE does not replace, and EXCHANGE exchanges", |base| {
        let (one, two) = (file(&base.join("one"), "1"), file(&base.join("two"), "2"));
        fails("NOREPLACE", rename_with(&one, &two, RenameFlags::NOREPLACE), &[Errno::EXIST]);
        rename_with(&one, &base.join("three"), RenameFlags::NOREPLACE).unwrap();
        rename_with(&base.join("three"), &two, RenameFlags::EXCHANGE).unwrap();
        assert_eq!((text(&two), text(&base.join("three"))), ("1".into(), "2".into()));
        fs::create_dir_all(base.join("directory/sub")).unwrap();
        rename_with(&two, &base.join("directory"), RenameFlags::EXCHANGE).unwrap();
        assert!(text(&base.join("directory")) == "1" && base.join("two/sub").is_dir());
        rename_with(&base.join("two/sub"), &base.join("directory"), RenameFlags::EXCHANGE).unwrap();
        assert!(text(&base.join("two/sub")) == "1" && base.join("directory").is_dir());
        assert_eq!(fs::metadata(base.join("directory/..")).unwrap().ino(), fs::metadata(base).unwrap().ino());
        let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
        fails("both", rename_with(&base.join("two"), &base.join("three"), both), &[Errno::INVAL]);
    }),
    ("a removed file lives on while it is open", |base| {
        let path = base.join("file");
        let opened = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let inode = opened.metadata().unwrap().ino();
        opened.write_all_at(b"before", 0).unwrap();
        fs::remove_file(&path).unwrap();
        fails("stat", fs::metadata(&path), &[Errno::NOENT]);
        opened.set_len(100_000).unwrap();
        opened.write_all_at(b"after", 50_000).unwrap();
        opened.sync_all().unwrap();
        fs::set_permissions(
            format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened)),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )
        .unwrap();
        let status = opened.metadata().unwrap();
        assert_eq!((status.nlink(), status.len(), status.ino(), status.mode() & 0o777), (0, 100_000, inode, 0o600));
        let mut bytes = [0; 6];
        opened.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, *b"before");
        // Another file of that name is another file.
        file(&path, "other");
        assert_ne!(fs::metadata(&path).unwrap().ino(), inode);
        opened.read_exact_at(&mut bytes[..5], 50_000).unwrap();
        assert_eq!(bytes[..5], *b"after");
    }),
    ("a removed directory takes no files", |base| {
        let directory = base.join("directory");
        fs::create_dir(&directory).unwrap();
        let opened = open(&directory, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        fs::remove_dir(&directory).unwrap();
        let made = rustix::fs::openat(&opened, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU);
        fails("create", made, &[Errno::NOENT]);
        fails("mkdir", rustix::fs::mkdirat(&opened, "sub", Mode::RWXU), &[Errno::NOENT]);
        assert_eq!(rustix::fs::fstat(&opened).unwrap().st_nlink, 0);
    }),
    ("links are removed themselves, not what they name", |base| {
        let path = file(&base.join("file"), "content");
        fs::create_dir(base.join("directory")).unwrap();
        symlink("file", base.join("to file")).unwrap();
        symlink("directory", base.join("to directory")).unwrap();
        fails("rmdir of a link", fs::remove_dir(base.join("to directory")), &[Errno::NOTDIR]);
        fs::remove_file(base.join("to file")).unwrap();
        fs::remove_file(base.join("to directory")).unwrap();
        assert!(text(&path) == "content" && base.join("directory").is_dir());
    }),
    ("a listing has every name once, whatever is removed meanwhile", |base| {
        const COUNT: usize = 2_000;
        for number in 0..COUNT {
            File::create_new(base.join(format!("file number {number:05}"))).unwrap();
        }
        assert_eq!(listed(base).len(), COUNT);
        let mut seen = std::collections::BTreeSet::new();
        for (count, entry) in fs::read_dir(base).unwrap().enumerate() {
            let name = entry.unwrap().file_name();
            fs::remove_file(base.join(&name)).unwrap();
            assert!(seen.insert(name), "a name came twice, after {count}");
        }
        assert_eq!((seen.len(), listed(base).len()), (COUNT, 0));
    }),
    ("a listing tells types, itself and its parent", |base| {
        file(&base.join("file"), "");
        fs::create_dir(base.join("directory")).unwrap();
        symlink("file", base.join("link")).unwrap();
        let directory = open(base, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let mut found = std::collections::BTreeMap::new();
        for entry in rustix::fs::Dir::new(directory).unwrap() {
            let entry = entry.unwrap();
            found.insert(entry.file_name().to_str().unwrap().to_owned(), (entry.file_type(), entry.ino()));
        }
        use rustix::fs::FileType::{Directory, RegularFile, Symlink};
        let types: Vec<_> = found.iter().map(|(name, (kind, _))| (name.as_str(), *kind)).collect();
        let expected =
            [(".", Directory), ("..", Directory), ("directory", Directory), ("file", RegularFile), ("link", Symlink)];
        assert_eq!(types, expected);
        for name in ["file", "directory", "link"] {
            assert_eq!(found[name].1, fs::symlink_metadata(base.join(name)).unwrap().ino(), "{name}");
        }
    }),
    ("a listing begun again shows what is new", |base| {
        let directory = open(base, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let mut listing = rustix::fs::Dir::new(directory).unwrap();
        let mut names = || {
            listing.rewind();
            let mut names = 0;
            while let Some(entry) = listing.read() {
                entry.unwrap();
                names += 1;
            }
            names
        };
        assert_eq!(names(), 2);
        file(&base.join("file"), "");
        assert_eq!(names(), 3);
        fs::remove_file(base.join("file")).unwrap();
        assert_eq!(names(), 2);
    }),
    ("attributes are made, replaced, listed and removed", |base| {
        use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
        let path = file(&base.join("file"), "");
        for path in [path, base.to_owned()] {
            let get = |name: &str| {
                let mut value = [0_u8; 2048];
                let len = getxattr(&path, name, &mut value[..])?;
                Ok::<_, Errno>(value[..len].to_vec())
            };
            fails("get", get("user.name"), &[Errno::NODATA]);
            setxattr(&path, "user.name", b"value", XattrFlags::CREATE).unwrap();
            fails("create", setxattr(&path, "user.name", b"x", XattrFlags::CREATE), &[Errno::EXIST]);
            fails("replace", setxattr(&path, "user.other", b"x", XattrFlags::REPLACE), &[Errno::NODATA]);
            assert_eq!(get("user.name").unwrap(), b"value");
            setxattr(&path, "user.name", &[7; 2000], XattrFlags::REPLACE).unwrap();
            setxattr(&path, "user.empty", b"", XattrFlags::empty()).unwrap();
            assert_eq!((get("user.name").unwrap(), get("user.empty").unwrap()), (vec![7; 2000], Vec::new()));
            fails("a small buffer", getxattr(&path, "user.name", &mut [0_u8; 10][..]), &[Errno::RANGE]);
            assert_eq!(rustix::fs::getxattr_query(&path, "user.name").unwrap(), 2000);
            let mut list = [0_u8; 256];
            let len = listxattr(&path, &mut list[..]).unwrap();
            let names: Vec<&[u8]> =
                list[..len].split(|byte| *byte == 0).filter(|name| name.starts_with(b"user")).collect();
            assert!(names.contains(&&b"user.name"[..]) && names.contains(&&b"user.empty"[..]) && names.len() == 2);
            removexattr(&path, "user.name").unwrap();
            removexattr(&path, "user.empty").unwrap();
            fails("remove", removexattr(&path, "user.name"), &[Errno::NODATA]);
        }
    }),
    ("many threads make one name, and one of them makes it", |base| {
        for round in 0..20 {
            let path = base.join(format!("file {round}"));
            let made: usize = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..6).map(|_| scope.spawn(|| usize::from(File::create_new(&path).is_ok()))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(made, 1);
        }
    }),
    ("inode numbers tell files apart and stay", |base| {
        let mut inodes = std::collections::BTreeSet::new();
        for number in 0..100 {
            let path = file(&base.join(number.to_string()), "");
            assert!(inodes.insert(fs::metadata(path).unwrap().ino()));
        }
        for number in 0..100 {
            let found = rustix::fs::statat(CWD, base.join(number.to_string()), AtFlags::empty()).unwrap().st_ino;
            assert!(inodes.contains(&found));
        }
    }),
];

#[test]
fn posix_cases_hold_on_ext4() {
    run_on_ext4(&CASES);
}

#[test]
fn posix_cases_hold_on_the_mount() {
    run_on_a_mount("posix_cases_hold_on_the_mount", &CASES);
}

/// By design: an epoch would have to carry them, and no VMM makes them.
#[test]
fn hard_links_and_special_files_are_refused() {
    let Some(mount) = Mount::new("hard_links_and_special_files_are_refused") else { return };
    let live = mount.make_machine("web1");
    let path = file(&live.join("file"), "content");
    fails("link", fs::hard_link(&path, live.join("link")), &[Errno::PERM]);
    use rustix::fs::FileType;
    for kind in [FileType::Fifo, FileType::Socket, FileType::CharacterDevice, FileType::BlockDevice] {
        let made = rustix::fs::mknodat(CWD, live.join("special"), kind, Mode::RWXU, 0x103);
        fails("mknod", made, &[Errno::PERM]);
    }
    fails("bind", std::os::unix::net::UnixListener::bind(live.join("socket")), &[Errno::PERM]);
    // A regular file by mknod is a file like any other.
    rustix::fs::mknodat(CWD, live.join("regular"), FileType::RegularFile, Mode::RUSR | Mode::WUSR, 0).unwrap();
    fs::write(live.join("regular"), "content").unwrap();
    assert_eq!(listed(&live), [b"file".to_vec(), b"regular".to_vec()]);
    mount.finish();
}

#[test]
fn canary_posix_a_case_that_does_not_hold_is_told_with_its_name() {
    let place = Place::plain("canary_posix");
    let cases: [Case; 2] =
        [("this holds", |_| ()), ("this does not", |base| fails("x", fs::metadata(base), &[Errno::NOENT]))];
    let told = catch_unwind(AssertUnwindSafe(|| run_cases(&place.live(), &cases, &|| ()))).unwrap_err();
    let told = told.downcast_ref::<String>().unwrap();
    assert!(told.contains("this does not") && !told.contains("this holds") && told.contains("1 of 2"), "{told}");
}
