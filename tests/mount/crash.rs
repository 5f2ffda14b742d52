//! P1, P2, P6: the daemon is killed at random moments under load. Nothing that was synced is lost, no epoch is half there,
//! and the next commit holds everything; who maps a file of a dead daemon gets an error and never wrong bytes.
//!
//! The writers and the list of what was acknowledged live in this process, which outlives the daemon. `crash_check.rs`
//! says what a crash may do to each kind of file. 10 kills, or 100 with `EPOCHFS_LONG=1`; `EPOCHFS_SEED` repeats a run's
//! choices, though not the moments at which things meet.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs::platform::random::Seeded;
use rustix::process::Signal;

use crate::child;
use crate::crash_check::{Appended, Mapped, Model, Moment, Names, Pages, page_of, records};
use crate::differential_tree::{Tree, compare_trees};
use crate::fixture::Mount;
use crate::must;
use crate::raw::Mapping;
use crate::support::{Check, PAGE, Saying, is_long, noise, open, rename, seed};

/// A planted fault: what a writer notes as synced without having synced it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    None,
    /// Stores in a map that nobody sent on their way.
    StoresWithoutSync,
    /// A write that was left out.
    SkippedWrite,
}

type Shared<M> = Arc<Mutex<M>>;
type IoResult = std::io::Result<()>;

fn write_pages(model: &Mutex<Pages>, live: &Path, seeded: &mut Seeded, lie: Lie) -> IoResult {
    let (files, pages) = {
        let model = model.lock().unwrap();
        let open_one = |file| open(&model.path(live, file));
        ((0..model.files).map(open_one).collect::<std::io::Result<Vec<_>>>()?, model.pages)
    };
    loop {
        let file = seeded.below(files.len() as u64);
        if seeded.chance(150) {
            let returned = model.lock().unwrap().returned;
            files[file as usize].sync_all()?;
            // One fsync makes everything of the machine durable.
            let mut model = model.lock().unwrap();
            model.synced = model.synced.max(returned);
            continue;
        }
        let count = 1 + seeded.below(8);
        let first = seeded.below(pages - count + 1);
        let (version, bytes) = {
            let mut model = model.lock().unwrap();
            let version = model.issue(file, first..first + count);
            (version, model.content(version, file, first..first + count))
        };
        if lie == Lie::SkippedWrite && seeded.chance(50) {
            // Then it is not there, whatever is synced later.
        } else {
            files[file as usize].write_all_at(&bytes, first * PAGE as u64)?;
        }
        model.lock().unwrap().returned = version;
    }
}

fn write_mapped(model: &Mutex<Mapped>, live: &Path, seeded: &mut Seeded, lie: Lie, is_over: &AtomicBool) -> IoResult {
    let (path, pages, id) = {
        let model = model.lock().unwrap();
        (live.join(&model.name), model.pages(), model.id)
    };
    let file = open(&path)?;
    let map = Mapping::shared(&file, 0, pages * PAGE)?;
    loop {
        // Stores into pages that the kernel has go on for ever, whether there is a daemon or not.
        if is_over.load(Ordering::SeqCst) {
            return Err(std::io::Error::from_raw_os_error(libc::ENOTCONN));
        }
        for _ in 0..1 + seeded.below(40) {
            let page = seeded.below(pages as u64) as usize;
            let version = model.lock().unwrap().issue(page);
            map.write(page * PAGE, &page_of(version, id * 16, page as u64))?;
        }
        let stored = model.lock().unwrap().stored();
        match seeded.below(4) {
            _ if lie == Lie::StoresWithoutSync => model.lock().unwrap().acknowledge(&stored),
            0 => {
                file.sync_data()?;
                model.lock().unwrap().acknowledge(&stored);
            }
            1 => {
                map.sync_all()?;
                model.lock().unwrap().acknowledge(&stored);
            }
            2 => {
                let first = seeded.below(pages as u64) as usize;
                map.sync(first * PAGE..pages * PAGE)?;
                let of_the_range: Vec<u64> =
                    stored.iter().enumerate().map(|(page, stored)| if page < first { 0 } else { *stored }).collect();
                model.lock().unwrap().acknowledge(&of_the_range);
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_micros(seeded.below(1500)));
    }
}

fn append(model: &Mutex<Appended>, live: &Path, seeded: &mut Seeded) -> IoResult {
    use std::io::Seek;
    let mut file = open(&live.join(&model.lock().unwrap().name))?;
    file.seek(std::io::SeekFrom::End(0))?;
    loop {
        let number = {
            let mut model = model.lock().unwrap();
            model.issued += 1;
            model.issued
        };
        // A record that lies on two pages is two writes to the daemon, which may die between them: then the next call tells.
        file.write_all(&records(number - 1..number))?;
        model.lock().unwrap().returned = number;
        if seeded.chance(100) {
            file.sync_data()?;
            model.lock().unwrap().synced = number;
        }
        std::thread::sleep(Duration::from_micros(seeded.below(300)));
    }
}

fn change_names(model: &Mutex<Names>, live: &Path, seeded: &mut Seeded) -> IoResult {
    let directory = live.join(&model.lock().unwrap().name);
    loop {
        let (number, is_made) = {
            let mut model = model.lock().unwrap();
            let oldest = model.now().iter().next().copied();
            match oldest.filter(|_| model.now().len() > 20 || seeded.chance(300)) {
                Some(oldest) => {
                    model.issue(oldest, false);
                    (oldest, false)
                }
                None => {
                    // The rename below is the operation; what comes before makes no name that counts.
                    drop(model);
                    (0, true)
                }
            }
        };
        if is_made {
            let number = model.lock().unwrap().issued + 1;
            let temporary = directory.join("new");
            let mut file = File::create(&temporary)?;
            file.write_all(&Names::content(number))?;
            file.sync_all()?;
            model.lock().unwrap().issue(number, true);
            rename(&temporary, &directory.join(number.to_string()))?;
        } else {
            fs::remove_file(directory.join(number.to_string()))?;
        }
        let now = {
            let mut model = model.lock().unwrap();
            model.returned = model.issued;
            model.issued
        };
        if seeded.chance(300) {
            File::open(&directory)?.sync_all()?;
            model.lock().unwrap().synced = now;
        }
    }
}

/// A commit, and what it must hold.
#[derive(Clone, Debug)]
struct Committed {
    floors: Vec<Moment>,
    ceilings: Vec<u64>,
    acknowledged: bool,
}

struct Machine {
    name: String,
    models: Vec<Shared<dyn Model>>,
    /// Commits whose content was not looked at yet.
    fresh: Mutex<BTreeMap<String, Committed>>,
    /// The digests of trees that were looked at.
    known: BTreeMap<String, Tree>,
    counter: AtomicU64,
}

struct Torture {
    mount: Mount,
    machines: Vec<Machine>,
    writers: Vec<(usize, Writer)>,
    seeded: Seeded,
    lie: Lie,
    landed: usize,
}

#[derive(Clone)]
enum Writer {
    Pages(Shared<Pages>),
    Mapped(Shared<Mapped>),
    Append(Shared<Appended>),
    Names(Shared<Names>),
}

impl Writer {
    /// Writes until the daemon is gone. Whatever ends it, but a dead daemon, is a failure.
    fn run(&self, live: &Path, seeded: &mut Seeded, lie: Lie, is_over: &AtomicBool) -> Check {
        let ended = match self {
            Self::Pages(model) => write_pages(model, live, seeded, lie),
            Self::Mapped(model) => write_mapped(model, live, seeded, lie, is_over),
            Self::Append(model) => append(model, live, seeded),
            Self::Names(model) => change_names(model, live, seeded),
        };
        let error = ended.expect_err("writers end by an error");
        must!(is_over.load(Ordering::SeqCst), "a writer failed before the daemon was killed: {error}");
        let number = error.raw_os_error();
        let expected = [libc::ENOTCONN, libc::EIO, libc::ECONNABORTED, libc::EFAULT, libc::EINTR, libc::ENODEV];
        must!(number.is_some_and(|number| expected.contains(&number)), "a dead daemon says {error}");
        Ok(())
    }
}

impl Torture {
    fn new(test: &str, lie: Lie, seed: u64) -> Option<Self> {
        let mount = Mount::new(test)?;
        let mut torture =
            Self { mount, machines: Vec::new(), writers: Vec::new(), seeded: Seeded::new(seed), lie, landed: 0 };
        let only_maps = lie == Lie::StoresWithoutSync;
        for (machine, name) in ["web1", "web2"].into_iter().enumerate() {
            let live = torture.mount.make_machine(name);
            let mut writers = Vec::new();
            if !only_maps {
                for id in 0..2 - machine as u64 {
                    let model = Pages::new(&format!("pages{id}-"), id, 2, 192);
                    for file in 0..2 {
                        fs::write(model.path(&live, file), vec![0; 192 * PAGE]).unwrap();
                    }
                    writers.push(Writer::Pages(Arc::new(Mutex::new(model))));
                }
            }
            if machine == 0 {
                fs::write(live.join("mapped"), vec![0; 192 * PAGE]).unwrap();
                writers.push(Writer::Mapped(Arc::new(Mutex::new(Mapped::new("mapped", 9, 192)))));
            }
            if machine == 0 && !only_maps {
                fs::write(live.join("log"), "").unwrap();
                writers.push(Writer::Append(Arc::new(Mutex::new(Appended::new("log")))));
                fs::create_dir(live.join("names")).unwrap();
                writers.push(Writer::Names(Arc::new(Mutex::new(Names::new("names")))));
            }
            let models = writers.iter().map(|writer| -> Shared<dyn Model> {
                match writer {
                    Writer::Pages(model) => Arc::<Mutex<Pages>>::clone(model),
                    Writer::Mapped(model) => Arc::<Mutex<Mapped>>::clone(model),
                    Writer::Append(model) => Arc::<Mutex<Appended>>::clone(model),
                    Writer::Names(model) => Arc::<Mutex<Names>>::clone(model),
                }
            });
            torture.machines.push(Machine {
                name: name.into(),
                models: models.collect(),
                fresh: Mutex::default(),
                known: BTreeMap::new(),
                counter: AtomicU64::new(0),
            });
            torture.writers.extend(writers.into_iter().map(|writer| (machine, writer)));
            torture.mount.commit(name, "empty").unwrap();
        }
        Some(torture)
    }

    /// Commits again and again until the daemon is gone.
    fn commit_all_the_time(mount: &Path, machine: &Machine, seeded: &mut Seeded, is_over: &AtomicBool) -> Check {
        loop {
            std::thread::sleep(Duration::from_millis(seeded.below(40)));
            let tag = format!("c{}", machine.counter.fetch_add(1, Ordering::SeqCst));
            let floors = machine.models.iter().map(|model| model.lock().unwrap().floor()).collect();
            let commit = Committed { floors, ceilings: Vec::new(), acknowledged: false };
            machine.fresh.lock().unwrap().insert(tag.clone(), commit);
            let made = fs::create_dir(mount.join(&machine.name).join("epochs").join(&tag));
            let ceilings = machine.models.iter().map(|model| model.lock().unwrap().issued()).collect();
            let mut fresh = machine.fresh.lock().unwrap();
            let commit = fresh.get_mut(&tag).expect("it was put there");
            (commit.ceilings, commit.acknowledged) = (ceilings, made.is_ok());
            if let Err(error) = made {
                must!(is_over.load(Ordering::SeqCst), "a commit failed before the daemon was killed: {error}");
                return Ok(());
            }
        }
    }

    /// Lets everybody write and commit for a while, and kills the daemon in the midst of it.
    fn load_and_kill(&mut self) -> Check {
        let is_over = AtomicBool::new(false);
        let longest = if self.seeded.chance(500) { 100 } else { 400 };
        let moment = Duration::from_millis(30 + self.seeded.below(longest));
        let mut seeds: Vec<Seeded> = Vec::new();
        for _ in 0..self.writers.len() + self.machines.len() {
            seeds.push(Seeded::new(self.seeded.next()));
        }
        let (lie, root) = (self.lie, self.mount.root().to_owned());
        let (writers, machines, mount) = (&self.writers, &self.machines, &self.mount);
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (machine, writer) in writers {
                let (live, mut seeded) = (mount.live(&machines[*machine].name), seeds.pop().expect("a seed"));
                let is_over = &is_over;
                threads.push(scope.spawn(move || writer.run(&live, &mut seeded, lie, is_over)));
            }
            for machine in machines {
                let (root, mut seeded, is_over) = (&root, seeds.pop().expect("a seed"), &is_over);
                threads.push(scope.spawn(move || Self::commit_all_the_time(root, machine, &mut seeded, is_over)));
            }
            std::thread::sleep(moment);
            is_over.store(true, Ordering::SeqCst);
            mount.signal(Signal::KILL);
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a writer panicked".to_owned())?)
        })
    }

    /// Looks at everything after the daemon has come back.
    fn check(&mut self, round: usize) -> Check {
        for machine in &mut self.machines {
            let live = self.mount.live(&machine.name);
            for model in &machine.models {
                model.lock().unwrap().check_live(&live).saying(format!("{}/live", machine.name))?;
            }
            let mut tags: Vec<String> = machine.known.keys().cloned().chain(["empty".to_owned()]).collect();
            for (tag, commit) in std::mem::take(&mut *machine.fresh.lock().unwrap()) {
                let path = self.mount.epoch(&machine.name, &tag);
                let what = format!("{}@{tag}", machine.name);
                if !path.exists() {
                    must!(!commit.acknowledged, "{what} was acknowledged and is not there");
                    continue;
                }
                self.landed += usize::from(!commit.acknowledged);
                for ((model, floor), ceiling) in machine.models.iter().zip(&commit.floors).zip(&commit.ceilings) {
                    let model = model.lock().unwrap();
                    // Whoever was cut off may have committed until the end.
                    let ceiling = if commit.acknowledged { *ceiling } else { model.issued() };
                    model.check_epoch(&path, floor, ceiling).saying(&what)?;
                }
                machine.known.insert(tag.clone(), Tree::read(&path)?);
                tags.push(tag);
            }
            // The next commit has all of live, and live begins anew from it.
            let tag = format!("after{round}");
            self.mount.commit(&machine.name, &tag).saying("the next commit")?;
            let path = self.mount.epoch(&machine.name, &tag);
            let mut expected = Tree::read(&live)?;
            expected.is_of_an_epoch();
            let found = Tree::read(&path)?;
            compare_trees(&found, &expected).saying("the next commit")?;
            machine.known.insert(tag.clone(), found);
            tags.push(tag);
            for model in &machine.models {
                model.lock().unwrap().rebase(&live)?;
            }
            must!(self.mount.epochs(&machine.name).len() == tags.len(), "an epoch is there that nobody made");
            // Old ones are looked at again, and then dropped.
            while machine.known.len() > 12 {
                let (tag, tree) = machine.known.pop_first().expect("there are twelve");
                let path = self.mount.epoch(&machine.name, &tag);
                compare_trees(&Tree::read(&path)?, &tree).saying(format!("{}@{tag}, later", machine.name))?;
                fs::remove_dir(&path).saying("rmdir")?;
            }
        }
        Ok(())
    }

    fn round(&mut self, round: usize) -> Check {
        self.load_and_kill()?;
        self.mount.kill_and_restart();
        self.check(round)?;
        if round % 10 == 9 {
            let verified = self.mount.run(["verify"]);
            must!(verified.status.success(), "verify: {verified:?}");
        }
        Ok(())
    }
}

#[test]
fn p1_p2_p6_a_daemon_killed_at_any_moment_loses_nothing_that_was_synced() {
    let seed = seed();
    let Some(mut torture) = Torture::new("p1_p2_p6_a_daemon_killed_at_any_moment", Lie::None, seed) else { return };
    let kills = if is_long() { 100 } else { 10 };
    let mut operations = 0;
    for round in 0..kills {
        if let Err(wrong) = torture.round(round) {
            panic!("EPOCHFS_SEED={seed}, kill {round}: {wrong}");
        }
        operations = torture
            .machines
            .iter()
            .flat_map(|machine| &machine.models)
            .map(|model| model.lock().unwrap().issued())
            .sum();
    }
    let commits: u64 = torture.machines.iter().map(|machine| machine.counter.load(Ordering::SeqCst)).sum();
    eprintln!(
        "{kills} kills, {operations} operations, {commits} commits, {} of them landed unacknowledged",
        torture.landed
    );
    assert!(operations > kills as u64 * 50 && commits > kills as u64, "{operations} operations, {commits} commits");
    torture.mount.finish();
}

#[test]
fn canary_p1_the_torture_notices_what_was_not_synced() {
    for lie in [Lie::StoresWithoutSync, Lie::SkippedWrite] {
        let Some(mut torture) = Torture::new("canary_p1_the_torture", lie, 1) else { return };
        let noticed = (0..5).find_map(|round| torture.round(round).err());
        eprintln!("{lie:?}: {noticed:?}");
        assert!(noticed.is_some(), "{lie:?} went unnoticed");
    }
}

/// What the file of the readers below holds.
const READ_LEN: usize = 64 << 20;

fn expected_word(offset: usize) -> u64 {
    Seeded::of(5, offset as u64).next()
}

fn fill_for_readers(path: &Path) {
    let mut file = File::create(path).unwrap();
    for start in (0..READ_LEN).step_by(1 << 20) {
        let piece: Vec<u8> =
            (start..start + (1 << 20)).step_by(8).flat_map(|at| expected_word(at).to_le_bytes()).collect();
        file.write_all(&piece).unwrap();
    }
}

/// Tells the parent that the reader is at work, and waits until the daemon is gone.
fn say_ready_and_wait() {
    eprintln!("ready");
    let _ = std::io::stdin().read(&mut [0; 1]);
}

/// A child's work: loads from a map, before and after the daemon dies. It ends by SIGBUS, or panics over a wrong word.
pub fn read_a_map_until_the_daemon_dies(arguments: &[String]) {
    let file =
        if arguments[1] == "shared" { open(Path::new(&arguments[0])) } else { File::open(&arguments[0]) }.unwrap();
    let map = match arguments[1].as_str() {
        "shared" => Mapping::shared(&file, 0, READ_LEN),
        _ => Mapping::private(&file, 0, READ_LEN),
    };
    let map = map.unwrap();
    map.advise(0..READ_LEN, libc::MADV_RANDOM).unwrap();
    let mut seeded = Seeded::new(1);
    let mut look = || {
        let at = seeded.below((READ_LEN / 8) as u64) as usize * 8;
        assert_eq!(map.load(at), expected_word(at), "WRONG BYTES at {at}");
    };
    (0..500).for_each(|_| look());
    say_ready_and_wait();
    (0..100_000).for_each(|_| look());
    panic!("every page of a dead daemon was to be had");
}

/// A child's work: reads with read(2), before and after the daemon dies. It ends well if it got an error and no wrong byte.
pub fn read_a_file_until_the_daemon_dies(arguments: &[String]) {
    let file = File::open(&arguments[0]).unwrap();
    let mut seeded = Seeded::new(2);
    let mut look = || -> std::io::Result<()> {
        let at = seeded.below((READ_LEN / PAGE) as u64) as usize * PAGE;
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, at as u64)?;
        for (index, word) in page.chunks(8).enumerate() {
            assert_eq!(word, expected_word(at + index * 8).to_le_bytes(), "WRONG BYTES at {at}");
        }
        Ok(())
    };
    (0..500).for_each(|_| look().unwrap());
    say_ready_and_wait();
    let ended = (0..100_000).find_map(|_| look().err()).expect("an error of a dead daemon");
    assert!([libc::ENOTCONN, libc::EIO, libc::ECONNABORTED].contains(&ended.raw_os_error().unwrap()), "{ended}");
}

fn wait_until_ready(child: &mut Child) -> BufReader<std::process::ChildStderr> {
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while said.read_line(&mut line).unwrap() > 0 {
        if line.contains("ready") {
            return said;
        }
    }
    panic!("the reader ended early: {line}");
}

#[test]
fn a_reader_whose_daemon_died_gets_an_error_and_never_wrong_bytes() {
    let Some(mut mount) = Mount::new("a_reader_whose_daemon_died") else { return };
    let live = mount.make_machine("web1");
    fill_for_readers(&live.join("memory"));
    let epoch = mount.commit("web1", "first").unwrap();
    // A fresh mount, whose kernel cache is empty.
    mount.restart();
    let path = |directory: &Path| -> PathBuf { directory.join("memory") };
    let (epoch, live) = (path(&epoch), path(&live));
    let work = [
        ("read_a_map", &epoch, "private"),
        ("read_a_map", &live, "private"),
        ("read_a_map", &live, "shared"),
        ("read_a_file", &epoch, ""),
        ("read_a_file", &live, ""),
    ];
    let mut readers = Vec::new();
    for (work, path, how) in work {
        let mut reader = child::start(work, &[path.to_str().unwrap(), how]);
        let said = wait_until_ready(&mut reader);
        readers.push((work, path, how, reader, said));
    }
    mount.kill();
    for (work, path, how, mut reader, mut said) in readers {
        drop(reader.stdin.take());
        let status = reader.wait().unwrap();
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        let what = format!("{work} {} {how}: {status}: {rest}", path.display());
        assert!(!rest.contains("WRONG"), "{what}");
        match work {
            "read_a_map" => assert_eq!(status.signal(), Some(libc::SIGBUS), "{what}"),
            _ => assert!(status.success(), "{what}"),
        }
        mount.beat();
    }
    mount.bury();
    mount.start();
    assert!(fs::read(&live).unwrap() == fs::read(&epoch).unwrap());
    mount.finish();
}

/// A child that reads other bytes than were written must be told from one that reads the right ones.
#[test]
fn canary_a_reader_notices_wrong_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    fs::write(&path, noise(1, READ_LEN)).unwrap();
    for work in ["read_a_map", "read_a_file"] {
        let mut reader = child::start(work, &[path.to_str().unwrap(), "private"]);
        drop(reader.stdin.take());
        let output = reader.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(!output.status.success() && String::from_utf8_lossy(&said).contains("WRONG BYTES"), "{work}");
    }
}
