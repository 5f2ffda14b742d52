//! P1, P2, P6 on a disk that is really full: a small tmpfs, mounted for the test. Needs root; skipped loudly without.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::image::PAGE;
use crate::support::program::{Program, run};

/// Room for the index too, whose log takes 18 MiB in advance.
const DISK_LEN: u64 = 64 << 20;

/// A tmpfs, unmounted with this value.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, more: &str) -> Option<Self> {
        Self::of_len(at, DISK_LEN, more)
    }

    fn of_len(at: PathBuf, len: u64, more: &str) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        let options = format!("size={len}{more}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "epochfs-test"]).arg(&at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            other => {
                eprintln!("SKIPPED: no tmpfs can be mounted here, so that no disk is filled: {other:?}");
                assert!(std::env::var_os("EPOCHFS_NO_SKIPS").is_none(), "a test was skipped");
                None
            }
        }
    }

    /// Fills the disk but for about this many bytes.
    fn fill(&self, left: u64) {
        let path = self.0.join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[0x55; PAGE as usize]).is_ok() {}
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

fn commit(program: &Program, file: &Path) -> std::process::Output {
    run(&mut program.command(&["commit", "web1", &format!("memory={}", file.display())]))
}

/// Exports and compares the epochs from this one on, and verifies all.
fn check(program: &Program, directory: &Path, epochs: &[Vec<u8>], from: usize) {
    for (number, content) in epochs.iter().enumerate().skip(from) {
        let target = directory.join("export");
        let name = format!("web1@{}", number + 1);
        let output = run(&mut program.command(&["export", &name, "--output", &target.display().to_string()]));
        assert!(output.status.success(), "{output:?}");
        assert!(fs::read(target.join("memory")).unwrap() == *content, "{name} is exported wrong");
        fs::remove_dir_all(target).unwrap();
    }
    let output = run(&mut program.command(&["verify"]));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

/// Commits on a disk with little room left; what is full is told and harms nothing, and with room it goes on.
fn fill_up(options: &str, state_on_disk: bool, fill: impl Fn(&Disk, u64), free: impl Fn(&Disk)) {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(directory.path().join("disk"), options) else { return };
    let state = if state_on_disk { disk.0.join("state") } else { directory.path().join("state") };
    let program = Program::new(directory.path()).unwrap().at(disk.0.join("repository"), state);
    assert!(run(&mut program.command(&["init"])).status.success());
    let file = directory.path().join("memory");
    let mut content = vec![0; 400 * PAGE as usize];
    let mut epochs = Vec::new();
    let mut refused = 0;
    for left in [u64::MAX, 0, PAGE, 3 * PAGE, 40 * PAGE, 200 * PAGE, 300 * PAGE] {
        if left != u64::MAX {
            fill(&disk, left);
        }
        // From a small record to a pack that is streamed.
        for pages in [1, 20, 120, 400] {
            content
                .splice(..pages * PAGE as usize, crate::crash::noisy_image(left ^ pages as u64, pages as u64).bytes());
            fs::write(&file, &content).unwrap();
            let output = commit(&program, &file);
            if output.status.success() {
                epochs.push(content.clone());
                let told: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(told["epoch"], epochs.len() as u64, "{told}");
            } else {
                refused += 1;
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!(output.status.code(), Some(1), "{text}");
                assert!(text.contains("No space left on device") && text.contains("free some space"), "{text}");
                assert!(text.contains("repository"), "it does not say where: {text}");
                let told: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(told["error"]["kind"], "no_space", "{told}");
            }
            check(&program, directory.path(), &epochs, epochs.len().saturating_sub(2));
            if left == u64::MAX {
                break;
            }
        }
        // Nothing of what failed is left behind.
        let left_behind = fs::read_dir(disk.0.join("repository/tmp")).unwrap().count();
        assert_eq!(left_behind, 0, "temporary files");
        if left != u64::MAX {
            free(&disk);
            let output = commit(&program, &file);
            let room = Command::new("df").arg(&disk.0).output();
            assert!(output.status.success(), "with room again: {output:?} {room:?}");
            epochs.push(content.clone());
            check(&program, directory.path(), &epochs, epochs.len().saturating_sub(2));
        }
    }
    check(&program, directory.path(), &epochs, 0);
    eprintln!("{refused} commits were refused for lack of room, {} came through", epochs.len());
    assert!(refused >= 5);
}

#[test]
fn p1_p2_p6_a_full_disk_loses_nothing_and_with_room_it_goes_on() {
    fill_up("", false, Disk::fill, Disk::free);
}

#[test]
fn p1_p2_p6_a_full_disk_that_holds_the_index_too_loses_nothing() {
    fill_up("", true, Disk::fill, Disk::free);
}

#[test]
fn p1_p2_p6_a_disk_without_inodes_loses_nothing() {
    let filler = |number: usize| format!("inode{number}");
    fill_up(
        ",nr_inodes=120",
        false,
        |disk, left| {
            let mut made = 0;
            while File::create(disk.0.join(filler(made))).is_ok() {
                made += 1;
            }
            // So that some of the files of a commit can be made.
            (0..made.min((left / PAGE) as usize).min(5))
                .for_each(|number| fs::remove_file(disk.0.join(filler(number))).unwrap());
        },
        |disk| {
            for number in 0..120 {
                let _ = fs::remove_file(disk.0.join(filler(number)));
            }
        },
    );
}

/// What gives room back works where there is none at all.
#[test]
fn p4_a_collector_works_on_a_disk_that_is_completely_full() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(directory.path().join("disk"), "") else { return };
    // What the collector remembers cannot be written either.
    let program = Program::new(directory.path()).unwrap().at(disk.0.join("repository"), disk.0.join("state"));
    assert!(run(&mut program.command(&["init"])).status.success());
    let file = directory.path().join("memory");
    let mut epochs = Vec::new();
    for seed in 0.. {
        let content = crate::crash::noisy_image(seed, 1000).bytes();
        fs::write(&file, &content).unwrap();
        let output = commit(&program, &file);
        if !output.status.success() {
            assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"), "{output:?}");
            break;
        }
        epochs.push(content);
    }
    assert!(epochs.len() > 5, "{}", epochs.len());
    disk.fill(0);
    let told = |words: &[&str]| -> Value {
        let output = run(&mut program.command(words));
        assert!(output.status.success(), "{words:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let newest = epochs.len();
    for epoch in 1..newest {
        told(&["rm", &format!("web1@{epoch}"), "--yes"]);
    }
    let ran = told(&["gc", "run", "--yes", "--orphans-after", "0s"]);
    assert!(ran["deleted"].as_u64().unwrap() >= newest as u64 - 1, "{ran}");
    // There is room again, for commits as well.
    fs::write(&file, &epochs[0]).unwrap();
    assert!(commit(&program, &file).status.success());
    check(&program, directory.path(), &epochs, newest - 1);
}

#[test]
fn commits_leave_room_for_the_collector() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::of_len(directory.path().join("disk"), 1 << 30, "") else { return };
    let program = Program::new(directory.path()).unwrap().at(disk.0.join("repository"), directory.path().join("state"));
    assert!(run(&mut program.command(&["init"])).status.success());
    let file = directory.path().join("memory");
    fs::write(&file, crate::crash::noisy_image(1, 100).bytes()).unwrap();
    assert!(commit(&program, &file).status.success());
    disk.fill(10 << 20);
    let output = commit(&program, &file);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("commits leave 16 MiB free") && text.contains("gc run"), "{text}");
    disk.free();
    assert!(commit(&program, &file).status.success());
}
