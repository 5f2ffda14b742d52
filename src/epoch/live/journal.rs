//! The journal file of a live: appended to at each sync, written anew at each commit, read back after a restart.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use epochfs_format::{JournalBase, JournalEntry, JournalNode, JournalReader, JournalWriter, hex};

use super::layer::Layer;
use super::spool::{Budget, Spool};
use super::tree::{Content, Tree};
use crate::error::{Error, Kind, Result};
use crate::platform::files::{File, Files};
use crate::platform::random;

/// A journal longer than this and than twice what it said when it was whole is written anew.
const LEN_MAX: u64 = 64 << 20;

const NAME: &str = "journal.";
const SPOOL: &str = "pages";

/// An open journal.
pub struct Journal {
    files: Arc<dyn Files>,
    directory: PathBuf,
    generation: u64,
    open: Option<Open>,
}

struct Open {
    file: Arc<dyn File>,
    len: u64,
    /// How long it was when it was written anew.
    whole_len: u64,
    writer: JournalWriter,
}

/// What a host kept of a machine's live.
pub struct Recovered {
    pub base: JournalBase,
    pub tree: Tree,
    pub spool: Spool,
    pub journal: Journal,
}

/// Makes a directory with those above it, durably.
fn make_directory(files: &dyn Files, path: &Path) -> std::io::Result<()> {
    let mut made = files.create_dir(path);
    if made.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        && let Some(above) = path.parent()
    {
        make_directory(files, above)?;
        made = files.create_dir(path);
    }
    let is_new = made.is_ok();
    match made {
        // Whoever made it may have ended before it was durable.
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let Some(above) = path.parent() else { return Ok(()) };
    files.sync_dir(above).inspect_err(|_| {
        // What a sync gave up no later one writes: the name has to be made once more.
        if is_new {
            let _ = files.remove_dir(path);
        }
    })
}

impl Journal {
    fn failed(directory: &Path, what: &str, error: std::io::Error) -> Error {
        Error::io(format!("cannot {what} the journal in {}", directory.display()), error)
    }

    /// Begins with an empty spool and no journal yet: the first thing to do is to write a whole one.
    pub fn create(files: Arc<dyn Files>, directory: &Path, budget: Arc<Budget>) -> Result<(Self, Spool)> {
        if let Some(above) = directory.parent() {
            make_directory(&*files, above).map_err(|error| Self::failed(above, "make a directory for", error))?;
        }
        make_directory(&*files, directory).map_err(|error| Self::failed(directory, "make a directory for", error))?;
        let path = directory.join(SPOOL);
        // Without a journal that names its slots a spool means nothing.
        if files.len(&path).is_ok() {
            files.remove_file(&path).map_err(|error| Self::failed(directory, "clear the spool beside", error))?;
        }
        let spool = Spool::create(&*files, &path, budget)?;
        // Now, and not with the journal's name: a sync that fails there could not be made good.
        files.sync_dir(directory).map_err(|error| {
            let _ = files.remove_file(&path);
            Self::failed(directory, "keep the spool beside", error)
        })?;
        let generation = generations(&*files, directory)?.last().copied().unwrap_or(0);
        Ok((Self { files, directory: directory.to_owned(), generation, open: None }, spool))
    }

    fn path(&self, generation: u64) -> PathBuf {
        self.directory.join(format!("{NAME}{generation}"))
    }

    /// Whether the next thing to write must be a whole journal.
    pub fn needs_whole(&self) -> bool {
        self.open.is_none()
    }

    /// Whether it says so much again and again that it is better written anew.
    pub fn is_long(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.len > LEN_MAX.max(open.whole_len.saturating_mul(2)))
    }

    /// Appends a group of changes, durably. After a failure only a whole new journal can go on.
    pub fn append(&mut self, entries: &[JournalEntry]) -> Result<()> {
        let mut open = self.open.take().expect("changes follow a whole journal");
        let mut bytes = Vec::new();
        put_group(&mut open.writer, entries, &mut bytes)?;
        let failed = |error| Self::failed(&self.directory, "append to", error);
        open.file.write_at(open.len, &bytes).map_err(failed)?;
        open.file.sync().map_err(failed)?;
        open.len += bytes.len() as u64;
        self.open = Some(open);
        Ok(())
    }

    /// Writes a whole journal and makes it the one that counts.
    pub fn rewrite(&mut self, entries: &[JournalEntry]) -> Result<()> {
        self.open = None;
        let mut bytes = Vec::new();
        let mut writer = JournalWriter::begin(random::id16(), &mut bytes);
        put_group(&mut writer, entries, &mut bytes)?;
        self.generation += 1;
        let path = self.path(self.generation);
        let failed = |error| Self::failed(&self.directory, "write", error);
        let write = || {
            let file = self.files.create_new(&path, false)?;
            file.write_at(0, &bytes)?;
            file.sync()?;
            self.files.sync_dir(&self.directory)?;
            Ok(file)
        };
        let file = write().map_err(|error| {
            // One that is not whole does not count; one that is says nothing wrong.
            let _ = self.files.remove_file(&path);
            failed(error)
        })?;
        for older in generations(&*self.files, &self.directory)? {
            if older < self.generation {
                self.files.remove_file(&self.path(older)).map_err(failed)?;
            }
        }
        let len = bytes.len() as u64;
        self.open = Some(Open { file, len, whole_len: len, writer });
        Ok(())
    }

    /// What was told last did not get through: only a whole new journal can go on.
    pub fn forget(&mut self) {
        self.open = None;
    }

    /// Removes journal and spool: the live holds nothing that an epoch does not.
    pub fn remove(mut self) -> Result<()> {
        self.open = None;
        let failed = |error| Self::failed(&self.directory, "remove", error);
        // The journal first: a spool without one means nothing, a journal without its spool would be damage.
        for generation in generations(&*self.files, &self.directory)?.into_iter().rev() {
            self.files.remove_file(&self.path(generation)).map_err(failed)?;
        }
        self.files.sync_dir(&self.directory).map_err(failed)?;
        self.files.remove_file(&self.directory.join(SPOOL)).map_err(failed)?;
        self.files.remove_dir(&self.directory).map_err(failed)
    }
}

fn put_group(writer: &mut JournalWriter, entries: &[JournalEntry], bytes: &mut Vec<u8>) -> Result<()> {
    for entry in entries {
        writer.put(entry, bytes)?;
    }
    Ok(writer.put(&JournalEntry::End, bytes)?)
}

/// The numbers of the journals in a directory, in order.
fn generations(files: &dyn Files, directory: &Path) -> Result<Vec<u64>> {
    let entries = match files.read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Journal::failed(directory, "look for", error)),
    };
    let mut found: Vec<u64> = entries.iter().filter_map(|entry| entry.name.strip_prefix(NAME)?.parse().ok()).collect();
    found.sort_unstable();
    Ok(found)
}

/// What a group of frames adds up to.
#[derive(Default)]
struct Replay {
    base: Option<JournalBase>,
    nodes: HashMap<u64, JournalNode>,
    layers: HashMap<u64, Layer>,
}

impl Replay {
    fn apply(&mut self, entry: JournalEntry) {
        let mut freed = Vec::new();
        match entry {
            JournalEntry::Base(base) => self.base = Some(base),
            JournalEntry::Node(node) => {
                self.nodes.insert(node.id, node);
            }
            JournalEntry::Gone(id) => {
                self.nodes.remove(&id);
                self.layers.remove(&id);
            }
            JournalEntry::Zeros { node, ranges } => {
                let layer = self.layers.entry(node).or_default();
                for (start, end) in ranges {
                    layer.replay_zeros(start..end, &mut freed);
                }
            }
            JournalEntry::Pages { node, pages } => {
                let layer = self.layers.entry(node).or_default();
                for page in pages {
                    layer.replay_page(page);
                }
            }
            JournalEntry::End => {}
        }
    }
}

/// Reads a journal: `None` when not even its first group is whole, as a crash leaves it.
fn replay(bytes: &[u8]) -> Result<Option<Replay>> {
    let mut reader = match JournalReader::new(bytes) {
        Ok(reader) => reader,
        Err(epochfs_format::FormatError::NewerVersion { what, found }) => {
            return Err(epochfs_format::FormatError::NewerVersion { what, found }.into());
        }
        Err(_) => return Ok(None),
    };
    let mut replay = Replay::default();
    let mut group = Vec::new();
    let mut groups = 0;
    while let Some(entry) = reader.next()? {
        if entry == JournalEntry::End {
            group.drain(..).for_each(|entry| replay.apply(entry));
            groups += 1;
        } else {
            group.push(entry);
        }
    }
    Ok((groups > 0).then_some(replay))
}

/// Finds what this host kept of a machine's live, if it kept anything.
pub fn recover(
    files: &Arc<dyn Files>,
    directory: &Path,
    repository: &[u8; 16],
    machine: &str,
    budget: Arc<Budget>,
) -> Result<Option<Recovered>> {
    let all = generations(&**files, directory)?;
    let newest = all.last().copied();
    for generation in all.iter().rev() {
        let path = directory.join(format!("{NAME}{generation}"));
        let at = |error: Error| {
            error.context(path.display()).hint("this host's copy of changes that no epoch holds is damaged")
        };
        let bytes = read_all(&**files, &path)?;
        let Some(replay) = replay(&bytes).map_err(at)? else { continue };
        let base = replay.base.ok_or_else(|| at(Error::damaged("it does not say what it is of")))?;
        if base.repository != *repository || base.machine != machine {
            let of = format!("it is of {} in repository {}", base.machine, hex(&base.repository));
            return Err(at(Error::new(Kind::Damaged, of)));
        }
        let tree = Tree::of_journal(replay.nodes.into_values().collect(), base.epoch, base.next_node).map_err(at)?;
        let mut named = BTreeSet::new();
        let mut pages = 0;
        for (id, layer) in replay.layers {
            let Ok(file) = tree.file(id) else { return Err(at(Error::damaged("it has pages of no file"))) };
            named.extend(layer.pages.values().map(|slot| slot.number));
            pages += layer.pages.len();
            file.recover(|current| *current = layer);
        }
        if named.len() < pages {
            return Err(at(Error::damaged("two pages lie in one slot")));
        }
        let slots: Vec<u32> = named.into_iter().collect();
        let spool = Spool::open(&**files, &directory.join(SPOOL), budget, &slots)?;
        let generation = newest.unwrap_or(*generation);
        let journal = Journal { files: files.clone(), directory: directory.to_owned(), generation, open: None };
        return Ok(Some(Recovered { base, tree, spool, journal }));
    }
    // A crash cuts off the first journal of all only while the spool is still empty, and any other one beside its
    // predecessor: pages without a journal that is whole were lost by damage, and must not be taken for none.
    let spool = directory.join(SPOOL);
    if newest.is_some() && files.len(&spool).is_ok_and(|len| len.is_some_and(|len| len > 0)) {
        return Err(Error::damaged(format!("no journal in {} is whole", directory.display()))
            .hint("this host's copy of changes that no epoch holds is damaged"));
    }
    Ok(None)
}

fn read_all(files: &dyn Files, path: &Path) -> Result<Vec<u8>> {
    let failed = |error| Error::io(format!("cannot read {}", path.display()), error);
    let file = files.open(path).map_err(failed)?;
    let mut bytes = vec![0; file.len().map_err(failed)? as usize];
    let count = file.read_at(0, &mut bytes).map_err(failed)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Everything there is to tell, or what is new since the last time.
pub fn entries_of(
    tree: &mut Tree,
    base: Option<JournalBase>,
    touched: Vec<Arc<super::file::LiveFile>>,
) -> Vec<JournalEntry> {
    let mut entries = Vec::new();
    let whole = base.is_some();
    let (mut changed, gone) = tree.take_changes();
    if let Some(base) = base {
        entries.push(JournalEntry::Base(base));
        changed = tree.nodes().map(|(id, _)| id).filter(|id| tree.is_named(*id)).collect();
    } else {
        entries.extend(gone.into_iter().map(JournalEntry::Gone));
        changed.extend(touched.iter().map(|file| file.id).filter(|id| tree.is_named(*id)));
        changed.sort_unstable();
        changed.dedup();
    }
    // What has no name is not told, and never gets a name again.
    touched.iter().filter(|file| !tree.is_named(file.id)).for_each(|file| file.tell_nothing());
    entries.extend(changed.iter().filter_map(|id| Some(JournalEntry::Node(tree.get(*id).ok()?.to_journal(*id)))));
    if whole {
        for id in &changed {
            if let Ok(Content::File(file)) = tree.get(*id).map(|node| &node.content) {
                file.journal(true, &mut entries);
            }
        }
    } else {
        for file in touched.iter().filter(|file| tree.is_named(file.id)) {
            file.journal(false, &mut entries);
        }
    }
    entries
}
