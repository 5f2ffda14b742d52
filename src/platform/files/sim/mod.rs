//! A file system in memory, for tests. It can be cut off after any change it was asked for, as if the power had
//! failed, and any of its calls can be made to fail.
//!
//! All choices come from seeds, so a failure that a test found can be repeated.

mod crash;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

pub use self::crash::Loss;
use self::tree::{Change, Node, NodeId, Outcome, Tree};
use super::{DIRECT_ALIGNMENT, Entry, File, Files};
use crate::platform::lock::lock;
use crate::platform::random::Seeded;

/// A simulated file system. Clones share it.
#[derive(Clone)]
pub struct SimFiles {
    state: Arc<Mutex<State>>,
}

struct State {
    /// What was on the disk before the first call.
    base: Vec<Node>,
    tree: Tree,
    seed: u64,
    calls: u64,
    failures: BTreeMap<u64, Failure>,
    lasting: Option<Failure>,
    direct: Direct,
}

/// How a call fails.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    pub errno: Errno,
    /// From then on instead of once. A lasting lack of space leaves alone what needs none.
    pub lasting: bool,
    /// The call does its work and reports the error all the same, as when the reply of a server is lost.
    pub after_effect: bool,
}

/// What the file system makes of direct files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    Works,
    RefusedAtCreate,
    RefusedAtWrite,
}

/// What a call needs, for a lasting lack of space.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    Space,
    Nothing,
}

impl SimFiles {
    /// An empty file system. The seed decides what a failed sync does.
    pub fn new(seed: u64) -> Self {
        Self::with_nodes(vec![Node::Dir { entries: BTreeMap::new() }], seed)
    }

    fn with_nodes(nodes: Vec<Node>, seed: u64) -> Self {
        let (base, tree) = (nodes.clone(), Tree::new(nodes));
        let state =
            State { base, tree, seed, calls: 0, failures: BTreeMap::new(), lasting: None, direct: Direct::Works };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// How many calls of any kind were made; the next one has this ordinal.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// How many changes and syncs were logged so far.
    pub fn log_len(&self) -> usize {
        self.lock().tree.log.len()
    }

    /// The changes in words.
    pub fn log(&self) -> Vec<String> {
        self.lock().tree.log.iter().map(ToString::to_string).collect()
    }

    /// Makes the call with this ordinal fail.
    pub fn fail_call(&self, ordinal: u64, failure: Failure) {
        self.lock().failures.insert(ordinal, failure);
    }

    /// Ends all failures, those to come included.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.failures.clear();
        state.lasting = None;
    }

    pub fn set_direct(&self, direct: Direct) {
        self.lock().direct = direct;
    }

    /// The file system as it may be after the power failed when the first `prefix` changes had been made.
    #[must_use]
    pub fn crash_state(&self, prefix: usize, loss: Loss) -> Self {
        let state = self.lock();
        let log = &state.tree.log[..prefix];
        Self::with_nodes(crash::after_power_loss(&state.base, &state.tree.nodes, log, loss), state.seed)
    }

    /// The two extremes, and so many states between them.
    pub fn crash_states(&self, prefix: usize, seed: u64, count: u64) -> impl Iterator<Item = (Loss, Self)> {
        let choices = (0..count).map(move |n| Loss::Some(Seeded::of(seed, (prefix as u64) << 32 | n).next()));
        [Loss::Everything, Loss::Nothing]
            .into_iter()
            .chain(choices)
            .map(move |loss| (loss, self.crash_state(prefix, loss)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn call<T>(&self, needs: Needs, work: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.lock();
        match state.next_failure(needs) {
            None => work(&mut state),
            Some(failure) => {
                if failure.after_effect {
                    work(&mut state)?;
                }
                Err(failure.errno.into())
            }
        }
    }

    /// A sync that fails has an effect of its own: the kernel may give up what it did not write.
    fn sync(&self, find: impl FnOnce(&Tree) -> io::Result<NodeId>) -> io::Result<()> {
        let mut state = self.lock();
        let failure = state.next_failure(Needs::Space);
        let node = find(&state.tree)?;
        let outcome = match failure {
            Some(failure) if !failure.after_effect => {
                let dropped = Seeded::of(state.seed, state.calls).chance(500);
                if dropped { Outcome::Dropped } else { Outcome::Kept }
            }
            _ => Outcome::Durable,
        };
        state.tree.change(Change::Sync { node, outcome });
        failure.map_or(Ok(()), |failure| Err(failure.errno.into()))
    }
}

impl State {
    fn next_failure(&mut self, needs: Needs) -> Option<Failure> {
        let ordinal = self.calls;
        self.calls += 1;
        let planned = self.failures.remove(&ordinal);
        if let Some(failure) = planned.filter(|failure| failure.lasting) {
            self.lasting = Some(failure);
        }
        let spared = |failure: &Failure| failure.errno == Errno::NOSPC && needs == Needs::Nothing;
        planned.or(self.lasting.filter(|failure| !spared(failure)))
    }
}

impl Files for SimFiles {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.call(Needs::Nothing, |state| {
            let node = state.tree.find_file(path)?;
            Ok(Arc::new(SimFile { files: self.clone(), node, direct: false }) as Arc<dyn File>)
        })
    }

    fn open_writable(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.open(path)
    }

    fn create_new(&self, path: &Path, direct: bool) -> io::Result<Arc<dyn File>> {
        self.call(Needs::Space, |state| {
            if direct && state.direct == Direct::RefusedAtCreate {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let modified_ns = state.tree.log.len() as u64;
            let node = state.tree.make(path, Node::File { data: Vec::new(), modified_ns }, "create")?;
            Ok(Arc::new(SimFile { files: self.clone(), node, direct }) as Arc<dyn File>)
        })
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Needs::Space, |state| {
            let node = state.tree.find_file(from)?;
            state.tree.name(to, node, "link")
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Needs::Nothing, |state| state.tree.rename(from, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.call(Needs::Nothing, |state| state.tree.remove_file(path))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call(Needs::Space, |state| {
            state.tree.make(path, Node::Dir { entries: BTreeMap::new() }, "make directory").map(|_| ())
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.call(Needs::Nothing, |state| state.tree.remove_dir(path))
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.call(Needs::Nothing, |state| {
            let entries = state.tree.entries(state.tree.find(path)?)?;
            let entry = |(name, node): (&String, &NodeId)| Entry {
                name: name.clone(),
                is_dir: matches!(state.tree.nodes[*node], Node::Dir { .. }),
            };
            Ok(entries.iter().map(entry).collect())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.sync(|tree| {
            let node = tree.find(path)?;
            tree.entries(node).map(|_| node)
        })
    }

    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        self.call(Needs::Nothing, |state| match &state.tree.nodes[state.tree.find(path)?] {
            Node::File { data, .. } => Ok(Some(data.len() as u64)),
            Node::Dir { .. } => Ok(None),
        })
    }

    /// The number of changes made before that one.
    fn modified_ns(&self, path: &Path) -> io::Result<u64> {
        self.call(Needs::Nothing, |state| match &state.tree.nodes[state.tree.find(path)?] {
            Node::File { modified_ns, .. } => Ok(*modified_ns),
            Node::Dir { .. } => Ok(0),
        })
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.call(Needs::Nothing, |state| {
            state.tree.find(path)?;
            Ok(Path::new("/").join(path).components().collect())
        })
    }
}

struct SimFile {
    files: SimFiles,
    node: NodeId,
    direct: bool,
}

impl File for SimFile {
    fn len(&self) -> io::Result<u64> {
        self.files.call(Needs::Nothing, |state| Ok(state.tree.data(self.node)?.len() as u64))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.files.call(Needs::Nothing, |state| {
            let data = state.tree.data(self.node)?;
            let rest = usize::try_from(offset).ok().and_then(|offset| data.get(offset..)).unwrap_or_default();
            let count = rest.len().min(buffer.len());
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        })
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.files.call(Needs::Space, |state| {
            let aligned = |number: usize| number.is_multiple_of(DIRECT_ALIGNMENT);
            let fits = offset.is_multiple_of(DIRECT_ALIGNMENT as u64)
                && aligned(buffer.len())
                && aligned(buffer.as_ptr().addr())
                && state.direct == Direct::Works;
            if self.direct && !fits {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            state.tree.change(Change::Write { file: self.node, offset, bytes: buffer.into() });
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.files.call(Needs::Space, |state| {
            state.tree.change(Change::SetLen { file: self.node, len });
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.files.sync(|_| Ok(self.node))
    }

    /// As the zeros that they read as from then on.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.files.call(Needs::Nothing, |state| {
            let end = (state.tree.data(self.node)?.len() as u64).min(offset.saturating_add(len));
            let bytes = vec![0; end.saturating_sub(offset) as usize];
            state.tree.change(Change::Write { file: self.node, offset, bytes: bytes.into() });
            Ok(())
        })
    }

    fn links(&self) -> io::Result<u64> {
        self.files.call(Needs::Nothing, |state| Ok(state.tree.links(self.node)))
    }
}
