//! Nobody waits for ever: writers whose own memory is what they write, commits during writeback, an unmount with dirty maps,
//! many threads at once, and too little memory. A watchdog tells where everybody sleeps if nothing moves for a minute.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::platform::random::Seeded;
use rustix::process::Signal;

use crate::child;
use crate::fixture::Mount;
use crate::raw::Mapping;
use crate::support::{PAGE, is_long, noise, open, rename, same, same_file, skip};

fn duration() -> Duration {
    Duration::from_secs(if is_long() { 60 } else { 3 })
}

#[test]
fn a_vmm_saves_onto_the_file_it_is_mapped_from_while_commits_go_on() {
    let Some(mount) = Mount::new("a_vmm_saves_onto_the_file_it_is_mapped_from") else { return };
    const LEN: usize = 32 << 20;
    let live = mount.make_machine("web1");
    let path = live.join("memory");
    let mut expected = noise(1, LEN);
    fs::write(&path, &expected).unwrap();
    let file = open(&path).unwrap();
    for (round, is_shared) in [(0, false), (1, true), (2, false), (3, true)] {
        let map = if is_shared { Mapping::shared(&file, 0, LEN) } else { Mapping::private(&file, 0, LEN) }.unwrap();
        // Some pages are the guest's own, the others lie in the page cache of the very file.
        for page in (round * 7..LEN / PAGE).step_by(13) {
            let bytes = noise((round * 100_000 + page) as u64, PAGE);
            map.write(page * PAGE, &bytes).unwrap();
            expected[page * PAGE..][..PAGE].copy_from_slice(&bytes);
        }
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut commits = 0;
                while !is_done.load(Ordering::SeqCst) || commits == 0 {
                    mount.commit("web1", &format!("r{round}c{commits}")).unwrap();
                    commits += 1;
                }
            });
            let target = File::options().write(true).open(&path).unwrap();
            for start in (0..LEN).step_by(LEN / 4) {
                map.write_into(&target, start as u64, start..start + LEN / 4).unwrap();
                mount.beat();
            }
            target.sync_all().unwrap();
            is_done.store(true, Ordering::SeqCst);
        });
        let epoch = mount.commit("web1", &format!("round{round}")).unwrap();
        same_file(&epoch.join("memory"), &expected).unwrap();
        same("the guest", &map.bytes(0..LEN).unwrap(), &expected).unwrap();
    }
    drop(file);
    mount.finish();
}

#[test]
fn commits_go_through_while_mapped_pages_are_written_back_all_the_time() {
    let Some(mount) = Mount::new("commits_go_through_while_mapped_pages_are_written_back") else { return };
    const LEN: usize = 24 << 20;
    let live = mount.make_machine("web1");
    let file = open(&live.join("memory")).unwrap();
    file.set_len(LEN as u64).unwrap();
    let map = Mapping::shared(&file, 0, LEN).unwrap();
    let (is_over, commits, started) = (AtomicBool::new(false), AtomicU64::new(0), Stopwatch::start());
    std::thread::scope(|scope| {
        for thread in 0..2_usize {
            let (map, is_over) = (&map, &is_over);
            scope.spawn(move || {
                let mut seeded = Seeded::new(thread as u64);
                let half = LEN / PAGE / 2;
                while !is_over.load(Ordering::SeqCst) {
                    for _ in 0..500 {
                        let page = thread * half + seeded.below(half as u64) as usize;
                        let word = (((page as u64) << 32) | (seeded.next() >> 40)).to_le_bytes();
                        map.write(page * PAGE, &word.repeat(PAGE / 8)).unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                map.sync_all().unwrap();
            }
        });
        while started.elapsed() < duration() {
            let epoch = mount.commit("web1", &format!("c{}", commits.fetch_add(1, Ordering::SeqCst))).unwrap();
            // Whatever moment it is of: each word belongs to its page.
            for (page, bytes) in fs::read(epoch.join("memory")).unwrap().chunks(PAGE).enumerate() {
                for word in bytes.chunks(8) {
                    let word = u64::from_le_bytes(word.try_into().unwrap());
                    assert!(word == 0 || word >> 32 == page as u64, "page {page} has a word of page {}", word >> 32);
                }
            }
        }
        is_over.store(true, Ordering::SeqCst);
    });
    map.sync_all().unwrap();
    let expected = map.bytes(0..LEN).unwrap();
    let epoch = mount.commit("web1", "last").unwrap();
    same_file(&epoch.join("memory"), &expected).unwrap();
    assert!(commits.load(Ordering::SeqCst) >= 3, "{commits:?} commits");
    drop((map, file));
    mount.finish();
}

/// SIGTERM while a file is mapped, with stores that nobody synced: the daemon says who holds it, and the stores arrive.
#[test]
fn a_graceful_stop_with_dirty_maps_ends_and_loses_nothing() {
    let Some(mut mount) = Mount::new("a_graceful_stop_with_dirty_maps") else { return };
    const LEN: usize = 16 << 20;
    let live = mount.make_machine("web1");
    let path = live.join("memory");
    let file = open(&path).unwrap();
    file.set_len(LEN as u64).unwrap();
    let map = Mapping::shared(&file, 0, LEN).unwrap();
    let expected = noise(1, LEN);
    map.write(0, &expected).unwrap();
    mount.signal(Signal::TERM);
    let (held, started) = (format!("(process {}) uses {}", std::process::id(), path.display()), Stopwatch::start());
    while !mount.log().contains(&held) {
        assert!(started.elapsed() < Duration::from_secs(8), "who holds it: {}", mount.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    // Held as it is, the file goes on being what it was.
    same("the map", &map.bytes(0..LEN).unwrap(), &expected).unwrap();
    map.sync(0..LEN / 2).unwrap();
    drop((map, file));
    mount.await_end();
    mount.start();
    same_file(&path, &expected).unwrap();
    mount.finish();
}

/// Everything at once from eight threads: what is read belongs where it is read, and nobody waits for ever.
#[test]
fn eight_threads_read_write_rename_and_commit_at_once() {
    let Some(mount) = Mount::new("eight_threads_read_write_rename_and_commit") else { return };
    const LEN: usize = 8 << 20;
    let live = mount.make_machine("web1");
    let path = live.join("memory");
    fs::write(&path, vec![0; LEN]).unwrap();
    fs::create_dir(live.join("names")).unwrap();
    let (is_over, work) = (AtomicBool::new(false), AtomicU64::new(0));
    let word_of = |page: usize, salt: u64| (((page as u64) << 32) | (salt >> 40)).to_le_bytes();
    let check = |bytes: &[u8], first: usize| {
        for (at, word) in bytes.chunks_exact(8).enumerate() {
            let (word, page) = (u64::from_le_bytes(word.try_into().unwrap()), first + at * 8 / PAGE);
            assert!(word == 0 || word >> 32 == page as u64, "page {page} has a word of page {}", word >> 32);
        }
    };
    let job = |number: u64, seeded: &mut Seeded| {
        let file = open(&path).unwrap();
        let page = seeded.below((LEN / PAGE - 8) as u64) as usize;
        let pages = 1 + seeded.below(8) as usize;
        let content: Vec<u8> =
            (page..page + pages).flat_map(|page| word_of(page, seeded.next()).repeat(PAGE / 8)).collect();
        match number {
            0 | 1 => file.write_all_at(&content, (page * PAGE) as u64).unwrap(),
            2 => {
                let map = Mapping::shared(&file, 0, LEN).unwrap();
                map.write(page * PAGE, &content).unwrap();
                map.sync(page * PAGE..(page + pages) * PAGE).unwrap();
            }
            3 | 4 => {
                let mut found = vec![0; content.len()];
                file.read_exact_at(&mut found, (page * PAGE) as u64).unwrap();
                check(&found, page);
            }
            5 => {
                let (one, two) =
                    (live.join(format!("names/{}", page % 10)), live.join(format!("names/{}", pages + 10)));
                fs::write(&one, &content).unwrap();
                rename(&one, &two).unwrap();
                if page.is_multiple_of(3) {
                    fs::remove_file(&two).unwrap();
                }
            }
            6 => {
                let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&file, punch, (page * PAGE) as u64, (pages * PAGE) as u64).unwrap();
                file.sync_data().unwrap();
            }
            _ => {
                let tag = format!("c{}", work.load(Ordering::SeqCst));
                if let Ok(epoch) = mount.commit("web1", &tag) {
                    let bytes = fs::read(epoch.join("memory")).unwrap();
                    assert_eq!(bytes.len(), LEN);
                    check(&bytes, 0);
                }
            }
        }
    };
    let started = Stopwatch::start();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (is_over, work, job, mount) = (&is_over, &work, &job, &mount);
            scope.spawn(move || {
                let mut seeded = Seeded::new(number);
                while !is_over.load(Ordering::SeqCst) {
                    job(number, &mut seeded);
                    work.fetch_add(1, Ordering::SeqCst);
                    mount.beat();
                }
            });
        }
        while started.elapsed() < duration() {
            std::thread::sleep(Duration::from_millis(50));
        }
        is_over.store(true, Ordering::SeqCst);
    });
    assert!(work.load(Ordering::SeqCst) > 500, "{work:?} pieces of work");
    check(&fs::read(&path).unwrap(), 0);
    mount.finish();
}

/// A cgroup with a limit of memory, of the second or the first kind; removed with this value.
struct Group {
    path: PathBuf,
    is_second: bool,
}

impl Group {
    fn new(name: &str, limit: u64) -> Result<Self, String> {
        let mut refused = Vec::new();
        let first = (Path::new("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", false);
        for (root, file, is_second) in [(Path::new("/sys/fs/cgroup"), "memory.max", true), first] {
            let path = root.join(format!("epochfs-test-{}-{name}", std::process::id()));
            // A directory is a group if the kernel fills it; its files are there or are not, and never made.
            let set =
                || File::options().write(true).open(path.join(file))?.write_all_at(limit.to_string().as_bytes(), 0);
            match fs::create_dir(&path).and_then(|()| set()) {
                Ok(()) => return Ok(Self { path, is_second }),
                Err(error) => refused.push(format!("{}: {error}", path.display())),
            }
            let _ = fs::remove_dir(&path);
        }
        Err(refused.join("; "))
    }

    fn add(&self, process: u32) {
        fs::write(self.path.join("cgroup.procs"), process.to_string()).unwrap();
    }

    /// The most that was ever used, in bytes.
    fn peak(&self) -> u64 {
        let file = if self.is_second { "memory.peak" } else { "memory.max_usage_in_bytes" };
        fs::read_to_string(self.path.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes have ended; the kernel may need a moment to see that.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A child's work: stores into more of a map than the memory it may have, twice, and reads all of it back.
pub fn dirty_a_map_larger_than_memory(arguments: &[String]) {
    use std::io::Read;
    // Not before the parent has put this process into its group.
    std::io::stdin().read_exact(&mut [0; 1]).unwrap();
    let len: usize = arguments[1].parse().unwrap();
    let file = open(Path::new(&arguments[0])).unwrap();
    file.set_len(len as u64).unwrap();
    let map = Mapping::shared(&file, 0, len).unwrap();
    for round in 1..=2_u64 {
        for at in (0..len).step_by(512) {
            map.store(at, (at as u64) << 8 | round);
        }
    }
    for at in (0..len).step_by(512) {
        assert_eq!(map.load(at), (at as u64) << 8 | 2, "at {at}");
    }
    map.sync_all().unwrap();
}

#[test]
fn a_writer_with_less_memory_than_it_dirties_ends() {
    let test = "a_writer_with_less_memory_than_it_dirties";
    const LEN: usize = 192 << 20;
    let (writers, daemons) = match (Group::new("writer", 64 << 20), Group::new("daemon", 512 << 20)) {
        (Ok(writers), Ok(daemons)) => (writers, daemons),
        (Err(why), _) | (_, Err(why)) => return skip(test, &format!("no cgroup with a limit of memory: {why}")),
    };
    let Some(mount) = Mount::new(test) else { return };
    let live = mount.make_machine("web1");
    let path = live.join("memory");
    let mut writer = child::start("dirty_a_map", &[path.to_str().unwrap(), &LEN.to_string()]);
    writers.add(writer.id());
    daemons.add(mount.pid());
    use std::io::Write;
    writer.stdin.take().unwrap().write_all(b"x").unwrap();
    // Commits go on, and each that goes through is a sign of life.
    let mut commits = 0;
    let status = loop {
        if let Some(status) = writer.try_wait().unwrap() {
            break status;
        }
        mount.commit("web1", &format!("c{commits}")).unwrap();
        commits += 1;
        std::thread::sleep(Duration::from_millis(200));
    };
    let mut said = String::new();
    std::io::Read::read_to_string(&mut writer.stderr.take().unwrap(), &mut said).unwrap();
    assert!(status.success(), "{status}: {said}");
    assert!(writers.peak() > 32 << 20, "there was no pressure: {} bytes", writers.peak());
    let epoch = mount.commit("web1", "last").unwrap();
    let file = File::open(epoch.join("memory")).unwrap();
    let mut word = [0; 8];
    for at in (0..LEN).step_by(512 * 17) {
        file.read_exact_at(&mut word, at as u64).unwrap();
        assert_eq!(u64::from_le_bytes(word), (at as u64) << 8 | 2, "at {at}");
    }
    drop(file);
    mount.finish();
}
