//! P6 where there is no room: the spool's disk is full, or the repository's, or the spool's own limit is reached. Writers are
//! told, mappings wait, nothing is lost, and when space returns everything goes on by itself.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;

use crate::fixture::{Mount, Options};
use crate::raw::Mapping;
use crate::support::{PAGE, errno, is_root, noise, open, same_file, skip};

/// Room for what the page index takes in advance, and some for the test.
const DISK_LEN: u64 = 64 << 20;

/// A tmpfs, unmounted with this value.
struct Disk(PathBuf);

impl Disk {
    fn new(test: &str, at: PathBuf) -> Option<Self> {
        if !is_root() {
            skip(test, "mounting a small disk needs root");
            return None;
        }
        fs::create_dir_all(&at).unwrap();
        let options = format!("size={DISK_LEN},mode=711");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "epochfs-test"]).arg(&at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            other => {
                skip(test, &format!("no tmpfs can be mounted: {other:?}"));
                None
            }
        }
    }

    /// Fills the disk but for about this many bytes.
    fn fill(&self, left: u64) {
        let path = self.0.join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[0x55; PAGE]).is_ok() {}
        drop(file);
        let len = fs::metadata(&path).unwrap().len();
        File::options().write(true).open(&path).unwrap().set_len(len.saturating_sub(left)).unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Writes pieces of noise one behind the other until one is refused for lack of room; how many went through.
fn write_until_full(file: &File, piece_len: usize, pieces: usize) -> usize {
    for number in 0..pieces {
        let piece = noise(number as u64, piece_len);
        let mut done = 0;
        while done < piece_len {
            match file.write_at(&piece[done..], (number * piece_len + done) as u64) {
                Ok(count) => done += count,
                Err(error) => {
                    assert_eq!(errno(&error), Some(Errno::NOSPC), "{error}");
                    return number;
                }
            }
        }
    }
    panic!("{} bytes fitted where they cannot", piece_len * pieces);
}

fn pieces(piece_len: usize, count: usize) -> Vec<u8> {
    (0..count).flat_map(|number| noise(number as u64, piece_len)).collect()
}

/// Everything that went through is there; what was refused changed at most its own place.
fn holds(path: &Path, piece_len: usize, count: usize) {
    let found = fs::read(path).unwrap();
    assert!(found.len() >= piece_len * count, "{} bytes, {count} pieces went through", found.len());
    assert!(found[..piece_len * count] == pieces(piece_len, count), "what went through is not there");
}

const PIECE: usize = 64 << 10;

#[test]
fn p6_a_full_disk_of_the_spool_refuses_writes_and_goes_on_with_room() {
    let test = "p6_a_full_disk_of_the_spool";
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::new(test, directory.path().join("disk")) else { return };
    let options = Options { state: Some(disk.0.join("state")), ..Options::default() }.full();
    let Some(mut mount) = Mount::with(test, options) else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("before"), noise(99, 100_000)).unwrap();
    mount.commit("web1", "before").unwrap();
    for round in 0..2 {
        // Beside what is left to journals.
        disk.fill(DISK_LEN / 16 + (2 << 20));
        let path = live.join("memory");
        let file = open(&path).unwrap();
        let count = write_until_full(&file, PIECE, 100);
        assert!(count >= 1, "2 MiB took nothing");
        holds(&path, PIECE, count);
        // Again and again it is refused, and reading goes on.
        for _ in 0..5 {
            let refused = file.write_all_at(&noise(7, 1 << 20), 64 << 20);
            assert_eq!(refused.err().as_ref().and_then(errno), Some(Errno::NOSPC));
        }
        holds(&path, PIECE, count);
        same_file(&live.join("before"), &noise(99, 100_000)).unwrap();
        disk.free();
        // Without anything being done, the same writer goes on.
        let all = count + 20;
        for number in count..all {
            file.write_all_at(&noise(number as u64, PIECE), (number * PIECE) as u64).unwrap();
        }
        file.set_len((all * PIECE) as u64).unwrap();
        file.sync_all().unwrap();
        drop(file);
        same_file(&path, &pieces(PIECE, all)).unwrap();
        let epoch = mount.commit("web1", &format!("round{round}")).unwrap();
        same_file(&epoch.join("memory"), &pieces(PIECE, all)).unwrap();
        same_file(&epoch.join("before"), &noise(99, 100_000)).unwrap();
        fs::remove_file(&path).unwrap();
        mount.commit("web1", &format!("removed{round}")).unwrap();
    }
    // Killed with a full disk, it comes back with what was synced.
    let file = open(&live.join("memory")).unwrap();
    file.write_all_at(&pieces(PIECE, 8), 0).unwrap();
    file.sync_all().unwrap();
    disk.fill(0);
    assert!(file.write_all_at(&noise(3, 8 << 20), 16 << 20).is_err());
    drop(file);
    mount.kill();
    mount.bury();
    disk.free();
    mount.start();
    holds(&live.join("memory"), PIECE, 8);
    let epoch = mount.commit("web1", "after").unwrap();
    holds(&epoch.join("memory"), PIECE, 8);
    mount.finish();
}

/// The spool is what fills the disk: it leaves what a commit needs, which makes room.
#[test]
fn p6_a_spool_that_fills_its_disk_is_emptied_by_commits_and_by_removing_files() {
    let test = "p6_a_spool_that_fills_its_disk";
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::new(test, directory.path().join("disk")) else { return };
    let options = Options { state: Some(disk.0.join("state")), ..Options::default() }.full();
    let Some(mut mount) = Mount::with(test, options) else { return };
    let live = mount.make_machine("web1");
    for round in 0..3 {
        let file = open(&live.join("memory")).unwrap();
        let count = write_until_full(&file, PIECE, 10_000);
        assert!(count * PIECE > DISK_LEN as usize / 4, "only {count} pieces in round {round}");
        file.sync_all().unwrap();
        if round == 1 {
            mount.kill_and_restart();
            holds(&live.join("memory"), PIECE, count);
        }
        let epoch = mount.commit("web1", &format!("round{round}")).unwrap();
        holds(&epoch.join("memory"), PIECE, count);
        // What no epoch has is given up with its file.
        let _ = write_until_full(&open(&live.join("other")).unwrap(), PIECE, 10_000);
        fs::remove_file(live.join("other")).unwrap();
        File::open(&live).unwrap().sync_all().unwrap();
        fs::remove_file(live.join("memory")).unwrap();
    }
    mount.finish();
}

#[test]
fn p6_a_full_repository_fails_the_commit_which_loses_nothing() {
    let test = "p6_a_full_repository_fails_the_commit";
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::new(test, directory.path().join("disk")) else { return };
    let options = Options { repository: Some(disk.0.join("repository")), ..Options::default() }.full();
    let Some(mut mount) = Mount::with(test, options) else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(0, 100_000)).unwrap();
    let first = mount.commit("web1", "first").unwrap();
    let mut expected = noise(0, 8 << 20);
    fs::write(live.join("memory"), &expected).unwrap();
    disk.fill(1 << 20);
    for attempt in 0..3 {
        let refused = mount.commit("web1", &format!("refused{attempt}")).expect_err("8 MiB do not fit in 1");
        assert_eq!(errno(&refused), Some(Errno::NOSPC), "{refused}");
        let by_command = mount.run(["commit", "web1", "--json"]);
        assert_eq!(by_command.status.code(), Some(1), "{by_command:?}");
        assert!(String::from_utf8_lossy(&by_command.stdout).contains("no_space"), "{by_command:?}");
        // Live goes on being written meanwhile, and what fails leaves no epoch.
        let change = noise(100 + attempt, 50_000);
        open(&live.join("memory")).unwrap().write_all_at(&change, attempt * 70_000).unwrap();
        let at = attempt as usize * 70_000;
        expected[at..at + change.len()].copy_from_slice(&change);
        same_file(&live.join("memory"), &expected).unwrap();
        assert_eq!(mount.epochs("web1").len(), 1);
        same_file(&first.join("memory"), &noise(0, 100_000)).unwrap();
        if attempt == 1 {
            File::open(live.join("memory")).unwrap().sync_all().unwrap();
            mount.kill_and_restart();
            same_file(&live.join("memory"), &expected).unwrap();
        }
    }
    disk.free();
    let epoch = mount.commit("web1", "with-room").unwrap();
    same_file(&epoch.join("memory"), &expected).unwrap();
    assert_eq!(mount.epochs("web1").len(), 2);
    let left_behind = fs::read_dir(mount.repository().join("tmp")).unwrap().count();
    assert_eq!(left_behind, 0, "unfinished files");
    mount.finish();
}

#[test]
fn p6_the_limit_of_the_spool_is_kept_and_a_commit_makes_room() {
    let Some(mount) = Mount::with("p6_the_limit_of_the_spool", Options::arguments(&["--spool-size", "4MiB"]).full())
    else {
        return;
    };
    let live = mount.make_machine("web1");
    let path = live.join("memory");
    let mut written = 0;
    for round in 0..3 {
        let file = open(&path).unwrap();
        // Each round begins with a spool that the commit before has emptied.
        let count = loop {
            let piece = noise(written as u64, PIECE);
            match file.write_all_at(&piece, (written * PIECE) as u64) {
                Ok(()) => written += 1,
                Err(error) => {
                    assert_eq!(errno(&error), Some(Errno::NOSPC), "{error}");
                    break written;
                }
            }
            assert!(written < 1_000, "no limit is kept");
        };
        assert!(count >= (round + 1) * 20, "only {count} pieces of 64 KiB in round {round} of a spool of 4 MiB");
        file.set_len((count * PIECE) as u64).unwrap();
        holds(&path, PIECE, count);
        let epoch = mount.commit("web1", &format!("round{round}")).unwrap();
        holds(&epoch.join("memory"), PIECE, count);
        // What was committed is read from the repository, and needs no room.
        holds(&path, PIECE, count);
    }
    // Giving back what was written makes room too.
    let file = open(&live.join("other")).unwrap();
    let count = write_until_full(&file, PIECE, 1_000);
    file.set_len(0).unwrap();
    file.write_all_at(&pieces(PIECE, count / 2), 0).unwrap();
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, (count / 2 * PIECE) as u64).unwrap();
    file.write_all_at(&pieces(PIECE, count / 2), 0).unwrap();
    drop(file);
    fs::remove_file(live.join("other")).unwrap();
    fs::write(live.join("another"), pieces(PIECE, count / 2)).unwrap();
    let epoch = mount.commit("web1", "last").unwrap();
    same_file(&epoch.join("another"), &pieces(PIECE, count / 2)).unwrap();
    mount.finish();
}

/// A commit has mapped pages written back before it makes room: were they to wait for room, it would wait for itself.
#[test]
fn p6_mapped_pages_go_beyond_the_limit_and_are_committed() {
    let Some(mount) = Mount::with("p6_mapped_pages_go_beyond", Options::arguments(&["--spool-size", "4MiB"]).full())
    else {
        return;
    };
    const LEN: usize = 10 << 20;
    let live = mount.make_machine("web1");
    let file = open(&live.join("memory")).unwrap();
    file.set_len(LEN as u64).unwrap();
    let map = Mapping::shared(&file, 0, LEN).unwrap();
    let expected = noise(1, LEN);
    map.write(0, &expected).unwrap();
    map.sync_all().unwrap();
    let machine = &mount.json(["status"])["daemons"][0]["machines"][0];
    assert_eq!(machine["spool_bytes"], LEN, "{machine:#}");
    // Who can be told is told.
    let refused = fs::write(live.join("more"), [1; PAGE]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()));
    // Pages that are not written back yet are so by the commit.
    let expected = noise(2, LEN);
    map.write(0, &expected).unwrap();
    mount.ok(["commit", "web1"]);
    same_file(&mount.machine("web1").join("latest/memory"), &expected).unwrap();
    fs::write(live.join("more"), [1; PAGE]).unwrap();
    drop(map);
    drop(file);
    mount.finish();
}

/// A disk that is really full, and that gets room from outside.
#[test]
fn p6_mapped_pages_wait_for_a_full_disk() {
    let test = "p6_mapped_pages_wait_for_a_full_disk";
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::new(test, directory.path().join("disk")) else { return };
    let options = Options { state: Some(disk.0.join("state")), ..Options::default() }.full();
    let Some(mount) = Mount::with(test, options) else { return };
    const LEN: usize = 6 << 20;
    let live = mount.make_machine("web1");
    let file = open(&live.join("memory")).unwrap();
    file.set_len(LEN as u64).unwrap();
    let map = Mapping::shared(&file, 0, LEN).unwrap();
    disk.fill(1 << 20);
    let expected = noise(2, LEN);
    map.write(0, &expected).unwrap();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| {
            let synced = map.sync_all();
            is_done.store(true, Ordering::SeqCst);
            synced
        });
        std::thread::sleep(Duration::from_millis(700));
        assert!(!is_done.load(Ordering::SeqCst), "6 MiB went onto a disk with 1, or were refused");
        disk.free();
        syncing.join().unwrap().expect("msync succeeds once there is room");
    });
    drop(map);
    drop(file);
    let epoch = mount.commit("web1", "last").unwrap();
    same_file(&epoch.join("memory"), &expected).unwrap();
    mount.finish();
}

/// A disk that is full must be told from one that lost what went through.
#[test]
fn canary_full_what_went_through_and_is_gone_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    fs::write(&path, pieces(PIECE, 3)).unwrap();
    holds(&path, PIECE, 3);
    open(&path).unwrap().write_all_at(&[0; 10], PIECE as u64 + 5).unwrap();
    assert!(std::panic::catch_unwind(|| holds(&path, PIECE, 3)).is_err());
    assert!(std::panic::catch_unwind(|| holds(&path, PIECE, 4)).is_err());
}
