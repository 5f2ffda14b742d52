//! What epochs hold, who sees it when, and what it costs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use epochfs::EpochStore;
use epochfs::platform::clock::Stopwatch;
use rustix::io::Errno;

use crate::fixture::{Mount, Options};
use crate::raw::Mapping;
use crate::support::{PAGE, difference, fails, files, noise, open, same, same_file};

/// How many bytes lie below a directory.
fn size_of(directory: &Path) -> u64 {
    files(directory).unwrap().values().map(|bytes| bytes.len() as u64).sum()
}

fn soon<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let started = Stopwatch::start();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "it did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_epochs_files_keep_their_inode_numbers() {
    let Some(mount) = Mount::new("an_epochs_files_keep_their_inode_numbers") else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 5 * PAGE)).unwrap();
    let first = mount.commit("web1", "first").unwrap().join("memory");
    let inode = |path: &Path| File::open(path).unwrap().metadata().unwrap().ino();
    let number = inode(&first);
    // Enough others that nothing is remembered by chance.
    for round in 0..20_u64 {
        fs::write(live.join("memory"), noise(round, 3 * PAGE)).unwrap();
        let other = mount.commit("web1", &format!("round{round}")).unwrap().join("memory");
        assert_ne!(inode(&other), number);
        assert_ne!(inode(&live.join("memory")), number);
    }
    let numbered = mount.epoch("web1", &mount.epochs("web1")[0].to_string()).join("memory");
    for path in [&first, &numbered, &first] {
        assert_eq!(inode(path), number, "{}", path.display());
    }
    mount.finish();
}

#[test]
fn who_has_an_epochs_file_open_reads_it_after_the_epoch_is_dropped() {
    let Some(mut mount) = Mount::new("who_has_an_epochs_file_open_reads_it") else { return };
    const LEN: usize = 16 << 20;
    let live = mount.make_machine("web1");
    let expected = noise(1, LEN);
    fs::write(live.join("memory"), &expected).unwrap();
    mount.commit("web1", "first").unwrap();
    // With a fresh kernel cache, so that pages come from the repository after the drop.
    mount.restart();
    let path = mount.epoch("web1", "first").join("memory");
    let (file, to_map) = (File::open(&path).unwrap(), File::open(&path).unwrap());
    let map = Mapping::private(&to_map, 0, LEN).unwrap();
    same("before", &map.bytes(0..PAGE).unwrap(), &expected[..PAGE]).unwrap();
    fs::remove_file(live.join("memory")).unwrap();
    mount.commit("web1", "second").unwrap();
    fs::remove_dir(mount.epoch("web1", "first")).unwrap();
    fails("open", File::open(&path), &[Errno::NOENT]);
    let mut found = vec![0; LEN / 2];
    file.read_exact_at(&mut found, 0).unwrap();
    same("by reading", &found, &expected[..LEN / 2]).unwrap();
    same("by the map", &map.bytes(LEN / 2..LEN).unwrap(), &expected[LEN / 2..]).unwrap();
    drop((map, file, to_map));
    mount.finish();
}

#[test]
fn what_was_not_there_is_seen_once_it_is() {
    let Some(mount) = Mount::new("what_was_not_there_is_seen_once_it_is") else { return };
    let live = mount.make_machine("web1");
    for round in 0..5 {
        let (file, epoch) = (live.join(format!("file{round}")), mount.epoch("web1", &format!("tag{round}")));
        for path in [&file, &epoch, &mount.machine("web7")] {
            fails("stat", fs::metadata(path), &[Errno::NOENT]);
        }
        fs::write(&file, "x").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"x");
        fs::create_dir(&epoch).unwrap();
        assert_eq!(fs::read(epoch.join(format!("file{round}"))).unwrap(), b"x");
    }
    // Another process commits a machine, with files of its own.
    let image = mount.beside("image");
    fs::write(&image, noise(7, 50_000)).unwrap();
    mount.ok(["commit", "web7", &format!("memory={}", image.display()), "--tag", "by-command"]);
    let path = mount.epoch("web7", "by-command").join("memory");
    assert_eq!(soon(|| fs::read(&path).ok()), noise(7, 50_000));
    soon(|| fs::read_dir(mount.root()).unwrap().any(|entry| entry.unwrap().file_name() == "web7").then_some(()));
    assert_eq!(
        fs::read(mount.live("web7").join("memory")).unwrap(),
        noise(7, 50_000),
        "live begins as the newest epoch"
    );
    // A clone by the command is a machine of the mount, and writable.
    fails("stat", fs::metadata(mount.machine("web8")), &[Errno::NOENT]);
    mount.ok(["clone", "web7@by-command", "web8"]);
    let clone = mount.live("web8").join("memory");
    assert_eq!(soon(|| fs::read(&clone).ok()), noise(7, 50_000));
    open(&clone).unwrap().write_all_at(b"changed", 0).unwrap();
    let epoch = mount.commit("web8", "changed").unwrap();
    let mut expected = noise(7, 50_000);
    expected[..7].copy_from_slice(b"changed");
    same_file(&epoch.join("memory"), &expected).unwrap();
    same_file(&path, &noise(7, 50_000)).unwrap();
    mount.finish();
}

#[test]
fn a_thousand_clones_cost_nothing_until_they_are_written() {
    const CLONES: usize = 1_000;
    let Some(mount) = Mount::new("a_thousand_clones_cost_nothing") else { return };
    let live = mount.make_machine("golden");
    let image = noise(1, 4 << 20);
    fs::write(live.join("memory"), &image).unwrap();
    mount.commit("golden", "ready").unwrap();
    let before = size_of(&mount.repository());
    let spool_before = size_of(&mount.state());
    // The library does it a thousand times in the time that processes take for a few.
    let store = EpochStore::open_directory(&mount.repository()).unwrap();
    let epoch = store.epoch(&"golden@ready".parse().unwrap()).unwrap();
    for number in 0..CLONES {
        store.clone_epoch(epoch.record(), &format!("clone{number}")).unwrap();
        mount.beat();
    }
    let per_clone = (size_of(&mount.repository()) - before) / CLONES as u64;
    assert!(per_clone < 2048, "{per_clone} bytes for each clone");
    soon(|| (fs::read_dir(mount.root()).unwrap().count() == CLONES + 1).then_some(()));
    for number in (0..CLONES).step_by(97) {
        let path = mount.live(&format!("clone{number}")).join("memory");
        assert_eq!(fs::metadata(&path).unwrap().len(), image.len() as u64);
        let mut page = vec![0; PAGE];
        File::open(&path).unwrap().read_exact_at(&mut page, (number * PAGE) as u64).unwrap();
        assert_eq!(page, image[number * PAGE..][..PAGE]);
    }
    assert!(size_of(&mount.state()) < spool_before + (1 << 20), "reading a clone fills the spool");
    // One is written, and pays for one page.
    let before = size_of(&mount.repository());
    let path = mount.live("clone7").join("memory");
    open(&path).unwrap().write_all_at(&noise(2, PAGE), 9 * PAGE as u64).unwrap();
    let epoch = mount.commit("clone7", "changed").unwrap();
    let mut expected = image.clone();
    expected[9 * PAGE..10 * PAGE].copy_from_slice(&noise(2, PAGE));
    same_file(&epoch.join("memory"), &expected).unwrap();
    let grown = size_of(&mount.repository()) - before;
    assert!(grown < 64 << 10, "{grown} bytes for one page");
    same_file(&mount.live("clone8").join("memory"), &image).unwrap();
    mount.finish();
}

/// Many files in many directories, as an epoch and as the live of a daemon that starts anew.
#[test]
fn thousands_of_files_in_directories_are_committed_and_come_back() {
    let Some(mut mount) = Mount::new("thousands_of_files_in_directories") else { return };
    let live = mount.make_machine("web1");
    let mut expected = BTreeMap::new();
    for number in 0..3_000_usize {
        let name = PathBuf::from(format!("d{}/sub{}/file{number}", number % 20, number % 3));
        let bytes = noise(number as u64, (number * 7) % 9_000);
        fs::create_dir_all(live.join(name.parent().unwrap())).unwrap();
        fs::write(live.join(&name), &bytes).unwrap();
        expected.insert(name, bytes);
        mount.beat();
    }
    let first = mount.commit("web1", "all").unwrap();
    let all_of = |path: &Path, expected: &BTreeMap<PathBuf, Vec<u8>>| {
        let found = files(path).unwrap();
        assert!(found.keys().eq(expected.keys()), "{}: {} files", path.display(), found.len());
        for (name, bytes) in expected {
            assert_eq!(difference(&found[name], bytes), None, "{}", name.display());
        }
    };
    all_of(&first, &expected);
    let before = expected.clone();
    for number in (0..20).step_by(2) {
        fs::remove_dir_all(live.join(format!("d{number}"))).unwrap();
        expected.retain(|name, _| !name.starts_with(format!("d{number}")));
        mount.beat();
    }
    let second = mount.commit("web1", "half").unwrap();
    all_of(&second, &expected);
    mount.restart();
    all_of(&live, &expected);
    all_of(&first, &before);
    let started = Stopwatch::start();
    mount.commit("web1", "nothing-new").unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?} for a commit of nothing", started.elapsed());
    mount.finish();
}

/// Epochs of before and after a restart, commits through all of it, and live as it was.
#[test]
fn epochs_and_live_are_the_same_after_a_restart_and_without_local_state() {
    let Some(mut mount) = Mount::new("epochs_and_live_are_the_same_after_a_restart") else { return };
    let live = mount.make_machine("web1");
    let mut epochs = Vec::new();
    for round in 0..6_u64 {
        let file = open(&live.join("memory")).unwrap();
        file.write_all_at(&noise(round, 30_000), round * 20_000).unwrap();
        drop(file);
        let expected = fs::read(live.join("memory")).unwrap();
        epochs.push((mount.commit("web1", &format!("t{round}")).unwrap(), expected));
        if round % 2 == 1 {
            open(&live.join("memory")).unwrap().write_all_at(&noise(round + 100, 5_000), 3).unwrap();
            let dirty = fs::read(live.join("memory")).unwrap();
            mount.restart();
            same_file(&live.join("memory"), &dirty).unwrap();
        }
        for (epoch, expected) in &epochs {
            same_file(&epoch.join("memory"), expected).unwrap();
        }
    }
    let last = mount.commit("web1", "last").unwrap();
    let expected = fs::read(last.join("memory")).unwrap();
    // The repository is the truth: without any local state all is there, as last committed.
    mount.stop();
    fs::remove_dir_all(mount.state()).unwrap();
    mount.start();
    for (epoch, expected) in &epochs {
        same_file(&epoch.join("memory"), expected).unwrap();
    }
    same_file(&live.join("memory"), &expected).unwrap();
    mount.finish();
}

/// P5: damaged bytes are refused with EIO, and never served.
#[test]
fn p5_a_damaged_page_is_an_error_and_never_wrong_bytes() {
    let options = Options { expected: vec![""], ..Options::default() };
    let Some(mut mount) = Mount::with("p5_a_damaged_page_is_an_error", options) else { return };
    const LEN: usize = 4 << 20;
    let live = mount.make_machine("web1");
    let expected = noise(1, LEN);
    fs::write(live.join("memory"), &expected).unwrap();
    let path = mount.commit("web1", "first").unwrap().join("memory");
    mount.stop();
    let mut flipped = 0;
    let packs: Vec<_> =
        files(&mount.repository()).unwrap().into_iter().filter(|(_, bytes)| bytes.len() > 1 << 20).collect();
    for (name, mut bytes) in packs {
        for at in (200_000..bytes.len() - 300_000).step_by(500_000) {
            bytes[at] ^= 0x40;
            flipped += 1;
        }
        let pack = mount.repository().join(name);
        let _ = fs::remove_file(&pack);
        fs::write(pack, bytes).unwrap();
    }
    assert!(flipped >= 4);
    mount.start();
    let file = File::open(&path).unwrap();
    let (mut failed, mut right) = (0, 0);
    for page in 0..LEN / PAGE {
        let mut found = vec![0; PAGE];
        match file.read_exact_at(&mut found, (page * PAGE) as u64) {
            Ok(()) => {
                same(format!("page {page}"), &found, &expected[page * PAGE..][..PAGE]).unwrap();
                right += 1;
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "page {page}");
                failed += 1;
            }
        }
    }
    assert!(failed >= flipped && right > LEN / PAGE / 2, "{flipped} flipped, {failed} failed, {right} right");
    let map = Mapping::private(&file, 0, LEN).unwrap();
    assert!(map.bytes(0..LEN).is_err(), "a map of damaged pages faults");
    drop((map, file));
    let log = mount.log();
    assert!(log.contains("packs/") || log.contains("damaged"), "the log names no object: {log}");
    mount.stop();
}
