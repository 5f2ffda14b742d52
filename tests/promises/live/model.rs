//! Random calls on a live beside plain byte vectors: what it holds, what its epochs hold, and what is there after a
//! restart.

use std::collections::BTreeMap;
use std::sync::Arc;

use epochfs::epoch::live::{Allocation, CommitTicket, LiveCommit, ROOT, Refusal, SetAttributes};
use epochfs::platform::files::{Files, SimFiles};
use epochfs::platform::random::Seeded;

use super::{Daemon, PAGE, create_machine, epoch_files, open_store};
use crate::must;
use crate::support::{Check, Saying, is_long};

const NAMES: [&[u8]; 4] = [b"memory", b"disk0", b"vmstate", b"a\nb"];
const LEN_MAX: u64 = 20 * PAGE as u64;

type Oracle = BTreeMap<Vec<u8>, Vec<u8>>;

struct World {
    files: Arc<dyn Files>,
    daemon: Daemon,
    oracle: Oracle,
    /// Commits on their way, with what they must hold.
    tickets: Vec<(CommitTicket, Oracle)>,
    epochs: Vec<(u64, Oracle)>,
    /// What was done, for the report of a failure.
    done: Vec<String>,
}

fn refused(refusal: Refusal) -> String {
    format!("refused: {refusal:?}")
}

impl World {
    fn new() -> Check<Self> {
        let files: Arc<dyn Files> = Arc::new(SimFiles::new(1));
        create_machine(files.clone())?;
        let daemon = Daemon::start(open_store(files.clone())?, files.clone(), 1)?;
        Ok(Self { files, daemon, oracle: Oracle::new(), tickets: Vec::new(), epochs: Vec::new(), done: Vec::new() })
    }

    fn collect(&mut self) -> Check {
        for (ticket, oracle) in self.tickets.drain(..) {
            self.epochs.push((ticket.wait().saying("commit")?.epoch, oracle));
        }
        Ok(())
    }

    fn restart(&mut self) -> Check {
        // A process that ended renews no journal any more; this one's threads would.
        self.daemon.live.wait_for_commits();
        self.daemon = Daemon::start(open_store(self.files.clone())?, self.files.clone(), 1)?;
        Ok(())
    }

    fn step(&mut self, dice: &mut Seeded) -> Check {
        let name = NAMES[dice.below(4) as usize];
        let live = self.daemon.live.clone();
        let id = live.lookup(ROOT, name).ok().map(|(id, _)| id);
        let offset = if dice.chance(400) { dice.below(20) * PAGE as u64 } else { dice.below(LEN_MAX) };
        let choice = dice.below(100);
        self.done.push(format!("{choice} {} {offset}", name.escape_ascii()));
        match (choice, id) {
            (0..=39, _) => {
                let len =
                    if dice.chance(500) { (1 + dice.below(4)) as usize * PAGE } else { 1 + dice.below(9000) as usize };
                let bytes: Vec<u8> = if dice.chance(250) {
                    vec![0; len]
                } else {
                    let tag = dice.next() as u8 | 1;
                    (0..len).map(|at| tag.wrapping_add((at / 100) as u8)).collect()
                };
                self.done.push(format!("  write {len} bytes of {}", bytes[0]));
                self.daemon.write(name, offset, &bytes).map_err(refused)?;
                let file = self.oracle.entry(name.to_vec()).or_default();
                let end = offset as usize + len;
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[offset as usize..end].copy_from_slice(&bytes);
            }
            (40..=51, Some(id)) => {
                let set = SetAttributes { length: Some(offset), ..SetAttributes::default() };
                live.set_attributes(id, &set).map_err(refused)?;
                self.oracle.get_mut(name).expect("it exists").resize(offset as usize, 0);
            }
            (52..=61, Some(id)) => {
                let (len, grow) = (1 + dice.below(6 * PAGE as u64), dice.chance(500));
                self.done.push(format!("  zero {len} bytes, {grow}"));
                let file = live.file(id).map_err(refused)?;
                live.allocate(&file, offset..offset + len, Allocation::Zero { grow }).map_err(refused)?;
                let bytes = self.oracle.get_mut(name).expect("it exists");
                let (start, end) = (offset as usize, (offset + len) as usize);
                if grow && bytes.len() < end {
                    bytes.resize(end, 0);
                }
                let end = end.min(bytes.len());
                if start < end {
                    bytes[start..end].fill(0);
                }
            }
            (62..=66, Some(_)) => {
                live.remove(ROOT, name, false).map_err(refused)?;
                self.oracle.remove(name);
            }
            (67..=71, Some(_)) => {
                let to = NAMES[dice.below(4) as usize];
                self.done.push(format!("  to {}", to.escape_ascii()));
                live.rename((ROOT, name), (ROOT, to), true).map_err(refused)?;
                let bytes = self.oracle.remove(name).expect("it exists");
                self.oracle.insert(to.to_vec(), bytes);
            }
            (72..=77, _) => live.sync().saying("sync")?,
            (78..=86, _) => {
                let ticket = live.commit(LiveCommit::default()).saying("begin a commit")?;
                self.tickets.push((ticket, self.oracle.clone()));
                if dice.chance(500) {
                    self.collect()?;
                }
            }
            (87..=92, _) => {
                // Killed after a sync, perhaps with commits on their way that nobody waited for.
                live.sync().saying("sync")?;
                self.collect()?;
                self.restart()?;
            }
            (93..=96, _) => {
                self.collect()?;
                live.close().saying("close")?;
                self.restart()?;
            }
            (97..=98, Some(id)) => self.write_anew(name, id, dice)?,
            _ => self.collect()?,
        }
        self.check(dice)
    }

    /// Empties a file and writes it again, as monitors do that save memory: most of it is what it was.
    fn write_anew(&mut self, name: &[u8], id: u64, dice: &mut Seeded) -> Check {
        let live = self.daemon.live.clone();
        let set = SetAttributes { length: Some(0), ..SetAttributes::default() };
        live.set_attributes(id, &set).map_err(refused)?;
        let mut bytes = std::mem::take(self.oracle.get_mut(name).expect("it exists"));
        if dice.chance(300) && !bytes.is_empty() {
            let at = dice.below(bytes.len() as u64) as usize;
            bytes[at] ^= 0x55;
        }
        let mut at = 0;
        while at < bytes.len() {
            let len = ((1 + dice.below(5)) as usize * PAGE).min(bytes.len() - at);
            if dice.chance(200) {
                live.sync().saying("sync")?;
            }
            // Some pages are written again later, and some are left out.
            if dice.chance(900) {
                self.daemon.write(name, at as u64, &bytes[at..at + len]).map_err(refused)?;
                let now = self.oracle.get_mut(name).expect("it exists");
                now.resize(now.len().max(at + len), 0);
                now[at..at + len].copy_from_slice(&bytes[at..at + len]);
            }
            at += if dice.chance(800) { len } else { PAGE };
            if dice.chance(50) {
                live.sync().saying("sync")?;
                self.collect()?;
                self.restart()?;
                return Ok(());
            }
        }
        Ok(())
    }

    fn check(&self, dice: &mut Seeded) -> Check {
        let live = &self.daemon.live;
        let entries = live.entries(ROOT).map_err(refused)?;
        let names: Vec<&Vec<u8>> = entries.iter().map(|(name, ..)| name).collect();
        must!(names == self.oracle.keys().collect::<Vec<_>>(), "the names are {names:?}");
        for (name, bytes) in &self.oracle {
            let held = self.daemon.read(name)?;
            must!(held.len() == bytes.len(), "{}: {} bytes, not {}", name.escape_ascii(), held.len(), bytes.len());
            let wrong = held.iter().zip(bytes).position(|(a, b)| a != b);
            must!(wrong.is_none(), "{}: byte {wrong:?} is wrong", name.escape_ascii());
            let (id, _) = live.lookup(ROOT, name).map_err(refused)?;
            let file = live.file(id).map_err(refused)?;
            // A part, and what is said to be holes.
            let start = dice.below(LEN_MAX) as usize;
            let mut part = vec![0xdd; 1 + dice.below(10_000) as usize];
            let count = live.read(&file, start as u64, &mut part).saying("read a part")?;
            must!(
                part[..count] == bytes[start.min(bytes.len())..(start + part.len()).min(bytes.len())],
                "a part is wrong"
            );
            let mut at = 0;
            while let Some(data) = live.seek(&file, at, true).map_err(refused)? {
                must!(data >= at && data < bytes.len() as u64, "data at {data} of {}", bytes.len());
                must!(bytes[at as usize..data as usize].iter().all(|byte| *byte == 0), "data is said to be a hole");
                at = live.seek(&file, data, false).map_err(refused)?.ok_or("there is no hole at the end")?;
                must!(at > data && at <= bytes.len() as u64, "a hole at {at}");
            }
            must!(bytes[at as usize..].iter().all(|byte| *byte == 0), "data at the end is said to be a hole");
        }
        Ok(())
    }

    fn check_epochs(&mut self) -> Check {
        self.collect()?;
        for (epoch, oracle) in &self.epochs {
            must!(epoch_files(&self.daemon.store, *epoch)? == *oracle, "epoch {epoch} is not what was frozen");
        }
        Ok(())
    }
}

fn run(seed: u64, steps: u64) -> Check {
    let mut world = World::new()?;
    let mut dice = Seeded::new(seed);
    for number in 0..steps {
        world.step(&mut dice).map_err(|wrong| {
            let last = world.done[world.done.len().saturating_sub(60)..].join("\n");
            format!("seed {seed}, step {number}: {wrong}\nafter\n{last}")
        })?;
    }
    world.check_epochs().map_err(|wrong| format!("seed {seed}: {wrong}"))
}

#[test]
fn p6_a_live_and_its_epochs_hold_what_was_written() {
    let (cases, steps) = if is_long() { (400, 200) } else { (40, 60) };
    match std::env::var("EPOCHFS_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => run(seed, steps).unwrap(),
        None => (0..cases).try_for_each(|seed| run(seed, steps)).unwrap(),
    }
}

/// The oracle must notice a byte that is not as written.
#[test]
fn canary_a_wrong_byte_is_noticed() {
    let mut world = World::new().unwrap();
    world.daemon.write(b"memory", 0, &[7; PAGE]).unwrap();
    world.oracle.insert(b"memory".to_vec(), [[7; PAGE - 1].as_slice(), &[8]].concat());
    let wrong = world.check(&mut Seeded::new(1)).unwrap_err();
    assert!(wrong.contains("byte Some(4095) is wrong"), "{wrong}");
}
