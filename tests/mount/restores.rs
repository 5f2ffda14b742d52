//! P5 on restores: whatever is pushed, asked for, thrown out of the cache, or damaged, and in whatever order, a reader gets
//! the epoch's bytes or an error. And pushing does what it is for: a second restore finds there what the first one touched.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::platform::random::Seeded;
use rustix::fs::Advice;
use serde_json::Value;

use crate::fixture::{Mount, Options};
use crate::must;
use crate::raw::Mapping;
use crate::support::{Check, PAGE, Saying, is_long, is_root, noise, seed};

/// Pages of an image: more than a leaf of its tree, and not a whole number of them.
const PAGES: usize = 3 * 512 + 77;

/// An image with pages of all kinds: noise, text that compresses, zeros, and copies of each other.
fn image(seed: u64) -> Vec<u8> {
    let mut image = noise(seed, PAGES * PAGE);
    let mut random = Seeded::new(seed);
    for page in image.chunks_exact_mut(PAGE) {
        match random.below(8) {
            0 | 1 => page.fill(0),
            2 => page.fill(random.below(3) as u8 + 1),
            3 | 4 => page[PAGE / 4..].fill(7),
            _ => {}
        }
    }
    image
}

/// Commits images as epochs of one machine, each to the epoch before with some pages changed, and returns the last.
fn commit_epochs(mount: &Mount, machine: &str, count: u64) -> Vec<u8> {
    let live = mount.make_machine(machine);
    let mut content = image(seed());
    let mut random = Seeded::new(seed() ^ 77);
    for number in 0..count {
        if number > 0 {
            for _ in 0..60 {
                let page = random.below(PAGES as u64) as usize * PAGE;
                content[page..page + PAGE].copy_from_slice(&noise(random.next(), PAGE));
            }
        }
        fs::write(live.join("memory"), &content).unwrap();
        mount.commit(machine, &format!("e{number}")).unwrap();
    }
    content
}

fn prefetches(mount: &Mount) -> Vec<Value> {
    mount.json(["status"])["daemons"][0]["prefetches"].as_array().unwrap().clone()
}

/// Waits until the one prefetch there is has come to an end, and tells of it.
#[track_caller]
fn ended(mount: &Mount) -> Value {
    let since = Stopwatch::start();
    loop {
        mount.beat();
        if let [one] = &prefetches(mount)[..]
            && !["planning", "running"].contains(&one["state"].as_str().unwrap())
        {
            return one.clone();
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{:#?}", prefetches(mount));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Has the kernel forget the file's pages, as it does when memory is short.
fn evict(file: &File) {
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

/// Touches pages through a private mapping, as a monitor does, and keeps it for as long as it takes to be seen.
fn restore(path: &Path, pages: &[usize], expected: &[u8], hold: Duration) -> Check {
    let file = File::open(path).saying("open")?;
    let map = Mapping::private(&file, 0, expected.len()).saying("map")?;
    // A guest touches here and there.
    map.advise(0..expected.len(), MADV_RANDOM).saying("advise")?;
    let mut found = vec![0; PAGE];
    for page in pages {
        map.read(page * PAGE, &mut found).saying(format!("page {page}"))?;
        must!(found == expected[page * PAGE..][..PAGE], "page {page} is not the epoch's");
    }
    std::thread::sleep(hold);
    Ok(())
}

/// MADV_RANDOM: the kernel asks for the touched page alone.
const MADV_RANDOM: i32 = libc::MADV_RANDOM;

#[test]
fn a_second_restore_finds_there_what_the_first_one_touched() {
    let name = "a_second_restore_finds_there_what_the_first_one_touched";
    let Some(mut mount) = Mount::new(name) else { return };
    let expected = commit_epochs(&mount, "web1", 1);
    let path = mount.epoch("web1", "e0").join("memory");
    // In no order, with neighbours and without.
    let pages: Vec<usize> = (0..200).map(|at| at * 7919 % PAGES).chain(900..950).collect();
    mount.restart();
    restore(&path, &pages, &expected, Duration::from_millis(1500)).unwrap();
    let first = ended(&mount);
    assert_eq!((&first["source"], &first["pushed_pages"]), (&"nothing".into(), &0.into()), "{first:#}");
    mount.restart();
    let file = File::open(&path).unwrap();
    let second = ended(&mount);
    assert_eq!((&second["source"], &second["state"]), (&"trace".into(), &"done".into()), "{second:#}");
    let mut touched = pages.clone();
    touched.sort_unstable();
    touched.dedup();
    assert_eq!(second["pushed_pages"], touched.len(), "no page twice, and none that nobody touched: {second:#}");
    let read = |mount: &Mount| mount.json(["status"])["daemons"][0]["read_bytes"].as_u64().unwrap();
    let before = read(&mount);
    restore(&path, &pages, &expected, Duration::ZERO).unwrap();
    assert_eq!(read(&mount), before, "nothing had to be asked for");
    drop(file);
    // A clone's restores are as its origin's.
    mount.ok(["clone", "web1@e0", "web2"]);
    mount.restart();
    let file = File::open(mount.machine("web2").join("latest/memory")).unwrap();
    assert_eq!(ended(&mount)["source"], "trace");
    drop(file);
    let traces = |machine: &str| mount.repository().join("traces").join(machine);
    let has_traces = |machine: &str| {
        let streams = fs::read_dir(traces(machine)).into_iter().flatten();
        streams.flatten().any(|stream| fs::read_dir(stream.path()).unwrap().next().is_some())
    };
    assert!(has_traces("web1"));
    mount.ok(["rm", "web1", "--yes"]);
    assert!(!has_traces("web1"), "a namesake restores other pages");
    mount.finish();
}

/// Machines are restored from a clone so that they can be protected on: what they touch is what the original's next restore
/// will, whether it is by a clone or not.
#[test]
fn what_a_clone_touches_is_the_trace_of_its_origin() {
    let Some(mut mount) = Mount::new("what_a_clone_touches_is_the_trace_of_its_origin") else { return };
    let expected = commit_epochs(&mount, "web1", 1);
    let pages: Vec<usize> = (0..150).map(|at| at * 7919 % PAGES).collect();
    let others: Vec<usize> = (0..80).map(|at| 100 + at * 17).collect();
    for (clone, pages) in [("web2", pages.clone()), ("web3", [pages.clone(), others.clone()].concat())] {
        mount.ok(["clone", "web1@e0", clone]);
        mount.restart();
        let path = mount.live(clone).join("memory");
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let map = Mapping::shared(&file, 0, expected.len()).unwrap();
        map.advise(0..expected.len(), MADV_RANDOM).unwrap();
        let mut found = vec![0; PAGE];
        for page in &pages {
            map.read(page * PAGE, &mut found).unwrap();
            assert!(found == expected[page * PAGE..][..PAGE], "page {page} of {clone}");
        }
        // What is written is the clone's, and no reason to read it later from the original.
        map.write(5 * PAGE, &[1; PAGE]).unwrap();
        std::thread::sleep(Duration::from_millis(1500));
        assert!(prefetches(&mount).is_empty(), "nothing is pushed to a live");
    }
    mount.restart();
    let file = File::open(mount.epoch("web1", "e0").join("memory")).unwrap();
    let told = ended(&mount);
    let mut touched = [pages, others, vec![5]].concat();
    touched.sort_unstable();
    touched.dedup();
    assert_eq!((&told["source"], &told["pushed_pages"]), (&"trace".into(), &touched.len().into()), "{told:#}");
    drop(file);
    // A live that is no clone, and one that has gone on to epochs of its own, leave none.
    mount.commit("web3", "own").unwrap();
    mount.restart();
    fs::remove_dir_all(mount.repository().join("traces")).unwrap();
    for machine in ["web1", "web3"] {
        let file = File::options().read(true).write(true).open(mount.live(machine).join("memory")).unwrap();
        file.read_exact_at(&mut [0; PAGE], 900 * PAGE as u64).unwrap();
    }
    mount.stop();
    assert!(!mount.repository().join("traces").exists());
}

/// Nobody asks for pages that are there: a restore that was foreseen well makes only requests that were not foreseen.
#[test]
fn what_was_foreseen_well_is_not_forgotten_for_what_else_is_touched() {
    let Some(mut mount) = Mount::new("what_was_foreseen_well_is_not_forgotten") else { return };
    let expected = commit_epochs(&mount, "web1", 1);
    let path = mount.epoch("web1", "e0").join("memory");
    let first: Vec<usize> = (0..100).map(|at| at * 3).collect();
    let others: Vec<usize> = (0..100).map(|at| 800 + at * 5).collect();
    for pages in [first.clone(), [first.clone(), others.clone()].concat()] {
        mount.restart();
        let file = File::open(&path).unwrap();
        ended(&mount);
        restore(&path, &pages, &expected, Duration::from_millis(1500)).unwrap();
        drop(file);
    }
    mount.restart();
    let file = File::open(&path).unwrap();
    let told = ended(&mount);
    assert_eq!(told["foreseen_pages"], first.len() + others.len(), "{told:#}");
    drop(file);
    mount.finish();
}

#[test]
fn without_a_trace_what_changed_last_is_pushed_and_with_hydrate_everything() {
    let Some(mut mount) = Mount::new("without_a_trace_what_changed_last_is_pushed") else { return };
    let expected = commit_epochs(&mount, "web1", 3);
    mount.restart();
    let path = mount.machine("web1").join("latest/memory");
    let file = File::open(&path).unwrap();
    let told = ended(&mount);
    assert_eq!((&told["source"], &told["state"]), (&"changes".into(), &"done".into()), "{told:#}");
    let pushed = told["pushed_pages"].as_u64().unwrap();
    assert!((100..PAGES as u64).contains(&pushed), "some, and not all: {told:#}");
    let epoch = *mount.epochs("web1").iter().max().unwrap();
    ask(
        &mount,
        &serde_json::json!({"request": "prefetch", "machine": "web1", "epoch": epoch, "stream": "memory", "everything": true}),
    );
    let since = Stopwatch::start();
    while prefetches(&mount)[0]["resident_ms"].is_null() {
        assert!(since.elapsed() < Duration::from_secs(30), "{:#?}", prefetches(&mount));
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected);
    // Who is not open is not pushed to.
    let refused =
        ask(&mount, &serde_json::json!({"request": "prefetch", "machine": "web1", "epoch": epoch, "stream": "disk0"}));
    assert_eq!(refused["error"]["kind"], "not_found", "{refused:#}");
    drop(file);
    mount.finish();
}

/// Asks the daemon over its socket.
fn ask(mount: &Mount, question: &Value) -> Value {
    use std::io::{BufRead, BufReader, Write};
    let socket = mount.json(["status"])["daemons"][0]["socket"].as_str().unwrap().to_owned();
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let mut question = question.clone();
    question["version"] = 1.into();
    stream.write_all(format!("{question}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn a_copy_leaves_no_trace_and_a_mount_without_prefetching_pushes_nothing() {
    let Some(mut mount) = Mount::new("a_copy_leaves_no_trace") else { return };
    let expected = commit_epochs(&mount, "web1", 1);
    mount.restart();
    assert!(fs::read(mount.epoch("web1", "e0").join("memory")).unwrap() == expected);
    mount.stop();
    assert!(!mount.repository().join("traces").exists(), "a copy is no restore");
    drop(mount);
    let options = Options::arguments(&["--no-prefetch"]);
    let Some(mut mount) = Mount::with("a_mount_without_prefetching", options) else { return };
    let expected = commit_epochs(&mount, "web1", 2);
    mount.restart();
    restore(&mount.epoch("web1", "e1").join("memory"), &[5, 900, 17], &expected, Duration::ZERO).unwrap();
    assert!(prefetches(&mount).is_empty());
    mount.stop();
    assert!(!mount.repository().join("traces").exists());
}

#[test]
fn a_trace_that_is_damaged_or_foreign_is_not_used_and_harms_nobody() {
    let options = Options { expected: vec!["trace"], ..Options::default() };
    let Some(mut mount) = Mount::with("a_trace_that_is_damaged_or_foreign", options) else { return };
    let expected = commit_epochs(&mount, "web1", 1);
    let path = mount.epoch("web1", "e0").join("memory");
    let pages: Vec<usize> = (0..100).map(|at| at * 7919 % PAGES).collect();
    mount.restart();
    restore(&path, &pages, &expected, Duration::from_millis(1500)).unwrap();
    mount.stop();
    let streams = fs::read_dir(mount.repository().join("traces/web1")).unwrap().next().unwrap().unwrap().path();
    let trace = fs::read_dir(streams).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&trace).unwrap();
    for damage in ["cut", "flipped", "empty", "long"] {
        let mut bytes = whole.clone();
        match damage {
            "cut" => bytes.truncate(whole.len() / 2),
            "flipped" => bytes[whole.len() / 2] ^= 4,
            "empty" => bytes.clear(),
            _ => bytes.extend([0; 10]),
        }
        // A restore that went without has left one of its own.
        for entry in fs::read_dir(trace.parent().unwrap()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        fs::write(&trace, &bytes).unwrap();
        mount.start();
        let file = File::open(&path).unwrap();
        let told = ended(&mount);
        assert_eq!((&told["source"], &told["state"]), (&"nothing".into(), &"done".into()), "{damage}: {told:#}");
        drop(file);
        restore(&path, &pages, &expected, Duration::ZERO).unwrap();
        mount.stop();
    }
}

/// What readers found, for the test and for its canary.
fn read_at_random(file: &File, expected: &[u8], seed: u64, steps: u64, progress: &AtomicU64) -> Check {
    let mut random = Seeded::new(seed);
    let map = Mapping::private(file, 0, expected.len()).saying("map")?;
    if random.below(2) == 0 {
        map.advise(0..expected.len(), MADV_RANDOM).saying("advise")?;
    }
    let mut found = vec![0; 64 * PAGE];
    for _ in 0..steps {
        progress.fetch_add(1, Ordering::Relaxed);
        let first = random.below(PAGES as u64) as usize;
        let count = (1 + random.below(40) as usize).min(PAGES - first);
        let range: Range<usize> = first * PAGE..(first + count) * PAGE;
        let found = &mut found[..range.len()];
        if random.below(3) == 0 {
            file.read_exact_at(found, range.start as u64).saying(format!("reading {range:?}"))?;
        } else {
            map.read(range.start, found).saying(format!("touching {range:?}"))?;
        }
        must!(found == &expected[range.clone()], "{range:?} is not the epoch's");
        if random.below(50) == 0 {
            evict(file);
        }
    }
    Ok(())
}

#[test]
fn p5_a_restore_is_exact_whatever_is_pushed_asked_for_and_thrown_out() {
    let Some(mut mount) = Mount::new("p5_a_restore_is_exact_whatever_is_pushed") else { return };
    let expected = commit_epochs(&mount, "web1", 3);
    let path = mount.machine("web1").join("latest/memory");
    let epoch = *mount.epochs("web1").iter().max().unwrap();
    let rounds = if is_long() { 40 } else { 4 };
    let steps = if is_long() { 4000 } else { 700 };
    for round in 0..rounds {
        // Each time with the trace of the time before; now and then without it.
        if round % 4 == 3 {
            let _ = fs::remove_dir_all(mount.repository().join("traces"));
        }
        mount.restart();
        let file = File::open(&path).unwrap();
        if round % 2 == 1 {
            ask(
                &mount,
                &serde_json::json!({"request": "prefetch", "machine": "web1", "epoch": epoch, "stream": "memory", "everything": true}),
            );
        }
        let (progress, done) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|reader| {
                    let (file, expected, progress) = (&file, &expected, &progress);
                    let seed = seed() + round * 31 + reader;
                    scope.spawn(move || read_at_random(file, expected, seed, steps, progress))
                })
                .collect();
            if is_root() {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
                        std::thread::sleep(Duration::from_millis(100));
                    }
                });
            }
            let found: Vec<Check> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
            done.store(true, Ordering::Relaxed);
            for check in found {
                check.unwrap_or_else(|error| panic!("EPOCHFS_SEED={} round {round}: {error}", seed()));
            }
        });
        assert_eq!(progress.load(Ordering::Relaxed), 3 * steps);
        mount.beat();
    }
    mount.finish();
}

#[test]
fn canary_a_page_that_is_not_the_epochs_is_noticed() {
    let Some(mount) = Mount::new("canary_a_page_that_is_not_the_epochs_is_noticed") else { return };
    let mut expected = commit_epochs(&mount, "web1", 1);
    let file = File::open(mount.epoch("web1", "e0").join("memory")).unwrap();
    for page in expected.chunks_exact_mut(PAGE).step_by(16) {
        page[PAGE - 1] ^= 1;
    }
    let error = read_at_random(&file, &expected, seed(), 700, &AtomicU64::new(0)).unwrap_err();
    assert!(error.contains("is not the epoch's"), "{error}");
}

#[test]
fn p5_damage_is_an_error_for_who_asks_and_is_never_pushed() {
    let options = Options { expected: vec!["packs/"], ..Options::default() };
    let Some(mut mount) = Mount::with("p5_damage_is_an_error_for_who_asks_and_is_never_pushed", options) else {
        return;
    };
    let expected = commit_epochs(&mount, "web1", 2);
    mount.stop();
    // Some bytes in the middle of the largest object: pages, as there are more of these than of anything else.
    let packs = fs::read_dir(mount.repository().join("packs")).unwrap().flat_map(|directory| {
        fs::read_dir(directory.unwrap().path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    });
    let pack = packs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 40_000].iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::remove_file(&pack).unwrap();
    fs::write(&pack, &bytes).unwrap();
    mount.start();
    let file = File::open(mount.epoch("web1", "e1").join("memory")).unwrap();
    let epoch = *mount.epochs("web1").iter().max().unwrap();
    ask(
        &mount,
        &serde_json::json!({"request": "prefetch", "machine": "web1", "epoch": epoch, "stream": "memory", "everything": true}),
    );
    ended(&mount);
    let (mut damaged, mut found) = (0, vec![0; PAGE]);
    for page in 0..PAGES {
        match file.read_exact_at(&mut found, (page * PAGE) as u64) {
            Ok(()) => assert!(found == expected[page * PAGE..][..PAGE], "page {page} is not the epoch's"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "page {page}");
                damaged += 1;
            }
        }
    }
    assert!((5..60).contains(&damaged), "{damaged} pages are damaged");
    drop(file);
    mount.stop();
}
