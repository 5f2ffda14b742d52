//! fio, which verifies what it wrote by checksums of its own, on a mount. Skipped loudly where fio is not installed.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::fixture::Mount;
use crate::place::Place;
use crate::support::{is_long, noise, open, skip};

/// What each job writes, and how.
const JOBS: [(&str, &[&str]); 5] = [
    ("random", &["--ioengine=psync", "--rw=randwrite", "--bs=4k", "--fsync=64"]),
    ("mapped", &["--ioengine=mmap", "--rw=randwrite", "--bs=4k", "--fsync=128"]),
    ("direct", &["--ioengine=libaio", "--rw=randwrite", "--bs=16k", "--direct=1", "--iodepth=8"]),
    ("sequential", &["--ioengine=psync", "--rw=write", "--bs=1m", "--end_fsync=1"]),
    ("mixed", &["--ioengine=psync", "--rw=randrw", "--bsrange=512-64k", "--bs_unaligned", "--fallocate=keep"]),
];

fn fio(directory: &Path, job: &str, arguments: &[&str], more: &[&str]) -> Output {
    let size = if is_long() { "--size=512m" } else { "--size=16m" };
    let mut command = Command::new("fio");
    command.arg(format!("--name={job}")).arg(format!("--filename={}", directory.join(job).display()));
    command.args(["--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--verify_state_save=0", "--thread", size]);
    command.args(arguments).args(more).current_dir(std::env::temp_dir()).output().unwrap()
}

fn has_fio(test: &str) -> bool {
    let has = Command::new("fio").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has {
        skip(test, "fio is not installed (apt-get install fio)");
    }
    has
}

#[test]
fn fio_verifies_what_it_wrote_across_commits() {
    let test = "fio_verifies_what_it_wrote";
    if !has_fio(test) {
        return;
    }
    let Some(mut mount) = Mount::new(test) else { return };
    let live = mount.make_machine("fio");
    for (job, arguments) in JOBS {
        let output = fio(&live, job, arguments, &["--do_verify=1"]);
        assert!(output.status.success(), "{job}: {output:?}");
        let epoch = mount.commit("fio", job).unwrap();
        for (committed, _) in JOBS.iter().take_while(|(name, _)| *name != job).chain([&(job, arguments)]) {
            let same = fs::read(epoch.join(committed)).unwrap() == fs::read(live.join(committed)).unwrap();
            assert!(same, "{committed} differs in the epoch after {job}");
        }
    }
    // Once more from the repository, with a kernel cache that knows nothing.
    mount.restart();
    for (job, arguments) in JOBS {
        let output = fio(&live, job, arguments, &["--verify_only"]);
        assert!(output.status.success(), "{job}, after a restart: {output:?}");
        mount.beat();
    }
    mount.finish();
}

#[test]
fn canary_fio_notices_what_is_wrong() {
    if !has_fio("canary_fio_notices_what_is_wrong") {
        return;
    }
    let place = Place::plain("canary_fio");
    let (job, arguments) = JOBS[0];
    assert!(fio(&place.live(), job, arguments, &["--do_verify=1"]).status.success());
    assert!(fio(&place.live(), job, arguments, &["--verify_only"]).status.success());
    open(&place.live().join(job)).unwrap().write_all_at(&noise(1, 5_000), 3 << 20).unwrap();
    assert!(!fio(&place.live(), job, arguments, &["--verify_only"]).status.success());
}
