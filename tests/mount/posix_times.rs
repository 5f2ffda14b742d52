//! Cases of POSIX about times: which change, by what, and that those that are set stay.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use epochfs::platform::clock::now_ns;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags, utimensat};

use crate::posix::{Case, run_on_a_mount, run_on_ext4};
use crate::raw::Mapping;
use crate::support::rename;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Time(i64, i64);

/// The times of the last change of content and of the last change of anything.
fn times(path: &Path) -> (Time, Time) {
    let status = fs::symlink_metadata(path).unwrap();
    (Time(status.mtime(), status.mtime_nsec()), Time(status.ctime(), status.ctime_nsec()))
}

/// Which of both changed by this, on each path: 'm', 'c'.
fn changed(paths: &[&Path], by: impl FnOnce()) -> Vec<String> {
    let before: Vec<_> = paths.iter().map(|path| times(path)).collect();
    // Longer than the coarsest clock that a kernel stamps files with.
    std::thread::sleep(Duration::from_millis(15));
    by();
    let letters = |(path, before): (&&Path, (Time, Time))| {
        let after = times(path);
        assert!(after.0 >= before.0 && after.1 >= before.1, "{}: time went back", path.display());
        [(after.0 > before.0, 'm'), (after.1 > before.1, 'c')]
            .iter()
            .filter(|(is, _)| *is)
            .map(|(_, letter)| *letter)
            .collect()
    };
    paths.iter().zip(before).map(letters).collect()
}

fn set(path: &Path, atime: (i64, i64), mtime: (i64, i64)) {
    let time = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time(atime), last_modification: time(mtime) };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

const CASES: [Case; 10] = [
    ("what is new has the time of now", |base| {
        let before = now_ns() as i64 - 50_000_000;
        fs::write(base.join("file"), "x").unwrap();
        fs::create_dir(base.join("directory")).unwrap();
        symlink("file", base.join("link")).unwrap();
        let after = now_ns() as i64 + 50_000_000;
        for name in ["file", "directory", "link"] {
            let status = fs::symlink_metadata(base.join(name)).unwrap();
            for (sec, nsec) in [
                (status.atime(), status.atime_nsec()),
                (status.mtime(), status.mtime_nsec()),
                (status.ctime(), status.ctime_nsec()),
            ] {
                let at = sec * 1_000_000_000 + nsec;
                assert!((before..after).contains(&at), "{name}: {at} is not in {before}..{after}");
            }
        }
    }),
    ("names that come and go change their directory", |base| {
        let at = |name: &str| base.join(name);
        assert_eq!(changed(&[base], || fs::write(at("file"), "x").unwrap()), ["mc"]);
        assert_eq!(changed(&[base], || fs::create_dir(at("directory")).unwrap()), ["mc"]);
        assert_eq!(changed(&[base], || symlink("file", at("link")).unwrap()), ["mc"]);
        assert_eq!(changed(&[base], || fs::remove_file(at("link")).unwrap()), ["mc"]);
        let (other, file) = (at("directory"), at("file"));
        let moved = changed(&[base, &other], || rename(&file, &other.join("file")).unwrap());
        assert_eq!(moved, ["mc", "mc"]);
        assert_eq!(changed(&[base, &other], || fs::remove_file(other.join("file")).unwrap()), ["", "mc"]);
        assert_eq!(changed(&[base], || fs::remove_dir(&other).unwrap()), ["mc"]);
        // What fails changes nothing.
        assert_eq!(changed(&[base], || drop(fs::remove_file(at("missing")).unwrap_err())), [""]);
    }),
    ("a renamed file is as old as it was", |base| {
        fs::write(base.join("a"), "x").unwrap();
        let before = times(&base.join("a")).0;
        std::thread::sleep(Duration::from_millis(15));
        rename(&base.join("a"), &base.join("b")).unwrap();
        assert_eq!(times(&base.join("b")).0, before);
    }),
    ("content that changes changes both times", |base| {
        let path = base.join("file");
        fs::write(&path, "content").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(changed(&[&path, base], || file.write_all_at(b"x", 0).unwrap()), ["mc", ""]);
        assert_eq!(changed(&[&path], || file.set_len(100).unwrap()), ["mc"]);
        assert_eq!(changed(&[&path], || file.set_len(10).unwrap()), ["mc"]);
        assert_eq!(changed(&[&path], || drop(File::create(&path).unwrap())), ["mc"]);
        assert_eq!(changed(&[&path], || assert_eq!(file.write_at(b"", 5).unwrap(), 0)), [""]);
        assert_eq!(changed(&[&path], || drop(fs::read(&path).unwrap())), [""]);
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        file.write_all_at(&[1; 9000], 0).unwrap();
        assert_eq!(changed(&[&path], || rustix::fs::fallocate(&file, punch, 0, 4096).unwrap()), ["mc"]);
    }),
    ("a store in a map changes the times once it is synced", |base| {
        let path = base.join("file");
        fs::write(&path, vec![1; 8192]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let map = Mapping::shared(&file, 0, 8192).unwrap();
        map.read(0, &mut [0; 8192]).unwrap();
        let done = changed(&[&path], || {
            map.write(5000, b"stored").unwrap();
            map.sync_all().unwrap();
        });
        assert_eq!(done, ["mc"]);
    }),
    ("what is about a file changes only the time of that", |base| {
        let path = base.join("file");
        fs::write(&path, "content").unwrap();
        let chmod = |bits| fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
        assert_eq!(changed(&[&path, base], || chmod(0o600)), ["c", ""]);
        let (user, group) = (fs::metadata(&path).unwrap().uid(), fs::metadata(&path).unwrap().gid());
        let chown = || std::os::unix::fs::chown(&path, Some(user), Some(group)).unwrap();
        assert_eq!(changed(&[&path], chown), ["c"]);
        let name = "user.name";
        let put = || rustix::fs::setxattr(&path, name, b"value", XattrFlags::empty()).unwrap();
        assert_eq!(changed(&[&path], put), ["c"]);
        assert_eq!(changed(&[&path], || rustix::fs::removexattr(&path, name).unwrap()), ["c"]);
    }),
    ("times that are set are told to the nanosecond", |base| {
        fs::write(base.join("file"), "x").unwrap();
        fs::create_dir(base.join("directory")).unwrap();
        symlink("file", base.join("link")).unwrap();
        for name in ["file", "directory", "link"] {
            let path = base.join(name);
            for (atime, mtime) in [
                ((1_000_000_000, 123_456_789), (1_700_000_000, 987_654_321)),
                ((0, 0), (0, 1)),
                ((1, 999_999_999), (4_102_444_800, 5)),
                // After 2038 and 2106, and before 1970.
                ((5_000_000_000, 1), (9_000_000_000, 2)),
                ((-1, 0), (-1_000_000_000, 0)),
            ] {
                set(&path, atime, mtime);
                let status = fs::symlink_metadata(&path).unwrap();
                assert_eq!((status.atime(), status.atime_nsec()), atime, "{name}: atime");
                assert_eq!((status.mtime(), status.mtime_nsec()), mtime, "{name}: mtime");
            }
        }
    }),
    ("times before 1970 have parts of a second too", |base| {
        fs::write(base.join("file"), "x").unwrap();
        set(&base.join("file"), (-1, 999_999_999), (-1_000_000_000, 500_000_000));
        let status = fs::metadata(base.join("file")).unwrap();
        assert_eq!((status.mtime(), status.mtime_nsec()), (-1_000_000_000, 500_000_000));
        assert_eq!((status.atime(), status.atime_nsec()), (-1, 999_999_999));
    }),
    ("each time is set alone, or to now", |base| {
        let path = base.join("file");
        fs::write(&path, "x").unwrap();
        set(&path, (100, 1), (200, 2));
        set(&path, (0, UTIME_OMIT), (300, 3));
        let status = fs::metadata(&path).unwrap();
        assert_eq!((status.atime(), status.mtime()), (100, 300));
        set(&path, (400, 4), (0, UTIME_OMIT));
        let status = fs::metadata(&path).unwrap();
        assert_eq!((status.atime(), status.mtime()), (400, 300));
        set(&path, (0, UTIME_OMIT), (0, UTIME_NOW));
        let status = fs::metadata(&path).unwrap();
        assert_eq!(status.atime(), 400);
        assert!((now_ns() / 1_000_000_000).abs_diff(status.mtime() as u64) < 5);
    }),
    ("a write after times were set sets them anew", |base| {
        let path = base.join("file");
        fs::write(&path, "x").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        set(&path, (100, 1), (200, 2));
        file.write_all_at(b"y", 0).unwrap();
        assert!(times(&path).0.0 > 1_000_000_000, "{:?}", times(&path));
        set(&path, (100, 1), (200, 2));
        drop(file);
        assert_eq!(times(&path).0, Time(200, 2), "closing it is no change");
    }),
];

#[test]
fn posix_times_hold_on_ext4() {
    run_on_ext4(&CASES);
}

#[test]
fn posix_times_hold_on_the_mount() {
    run_on_a_mount("posix_times_hold_on_the_mount", &CASES);
}
