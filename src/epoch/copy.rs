//! Copying epochs to another repository: only what that one has not got, every page proven on the way.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use epochfs_format::{EntryKind, Image, PAGE_SIZE, hex, parse_id};

use super::commit::CommitOptions;
use super::diff::changed_pages;
use super::ranges::{Ranges, push_range};
use super::reader::{Epoch, SharedImage};
use super::source::Source;
use super::view::{EpochName, EpochStore, Which, commit_of};
use crate::error::{Error, Kind, Result};

/// The note of a copied epoch that says what it is a copy of: repository, epoch, time in nanoseconds, machine.
pub const COPY_NOTE: &str = "epochfs.copy-of";

/// What an epoch is a copy of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOf {
    pub repository: [u8; 16],
    pub machine: String,
    pub epoch: u64,
    /// When the original was made.
    pub time_ns: u64,
}

impl CopyOf {
    /// What the notes of a commit say.
    pub fn read(notes: &[(String, String)]) -> Option<Self> {
        let (_, note) = notes.iter().find(|(name, _)| name == COPY_NOTE)?;
        let mut words = note.splitn(4, ' ');
        Some(Self {
            repository: parse_id(words.next()?)?,
            epoch: words.next()?.parse().ok()?,
            time_ns: words.next()?.parse().ok()?,
            machine: words.next()?.to_owned(),
        })
    }

    fn note(&self) -> (String, String) {
        let text = format!("{} {} {} {}", hex(&self.repository), self.epoch, self.time_ns, self.machine);
        (COPY_NOTE.to_owned(), text)
    }
}

/// A copied epoch.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CopiedEpoch {
    pub from: u64,
    pub to: u64,
    pub read_bytes: u64,
    pub new_pages: u64,
    pub stored_bytes: u64,
}

/// What a copy came to.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Copied {
    pub epochs: Vec<CopiedEpoch>,
    /// Epochs that were there already.
    pub there_before: u64,
    /// Epochs older than the newest that is there, which are not there: they come too late.
    pub passed_over: u64,
}

/// A stream of a stored epoch as a source.
struct StoredSource<'a> {
    name: String,
    epoch: &'a Epoch,
    image: &'a Image,
}

impl StoredSource<'_> {
    fn shared(&self) -> SharedImage<'_> {
        SharedImage { nodes: self.epoch.nodes(), image: self.image }
    }
}

impl Source for StoredSource<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> u64 {
        self.image.length
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.shared().next_data(from)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let count = self.shared().read_at(offset, buffer)?;
        buffer[count..].fill(0);
        Ok(())
    }
}

/// Where a stream differs from an older one.
fn dirty(epoch: &Epoch, old: &Image, new: &Image) -> Result<Ranges> {
    let (size, end) = (PAGE_SIZE as u64, old.length.max(new.length));
    let mut runs: Vec<Range<u64>> = Vec::new();
    changed_pages(epoch.nodes(), old, new, &mut |page| {
        push_range(&mut runs, page * size..((page + 1) * size).min(end));
    })?;
    Ok(Ranges::new(runs))
}

impl EpochStore {
    /// Copies epochs of a machine to a machine of another repository, in order: all that exist, or only these. Those that
    /// are there already are not copied again, so that whoever was interrupted goes on where it stopped.
    pub fn copy_epochs(
        &self,
        machine: &Arc<str>,
        only: Option<&[u64]>,
        to: &EpochStore,
        to_machine: &str,
        on_epoch: &mut dyn FnMut(u64, u64),
    ) -> Result<Copied> {
        if self.repository().id() == to.repository().id() {
            return Err(
                Error::usage("both are the same repository").hint("within a repository, clone: nothing is copied")
            );
        }
        let opening = self.opening()?;
        let head = self.repository().require(machine)?;
        let list = self.repository().epochs(&head)?;
        let mut wanted: Vec<u64> = only.map_or_else(|| list.epochs.iter().collect(), <[u64]>::to_vec);
        wanted.sort_unstable();
        wanted.dedup();
        drop(opening);
        let (known, mut last) = self.copies_in(to, machine, to_machine)?;
        let newest = known.keys().next_back().copied().unwrap_or(0);
        let mut copied = Copied::default();
        let total = wanted.len() as u64;
        for (at, number) in wanted.into_iter().enumerate() {
            on_epoch(at as u64, total);
            if known.contains_key(&number) {
                copied.there_before += 1;
            } else if number < newest {
                copied.passed_over += 1;
            } else {
                let name = EpochName { machine: machine.clone(), which: Some(Which::Number(number)) };
                let epoch = match self.epoch(&name) {
                    // Dropped meanwhile.
                    Err(error) if error.kind() == Kind::NotFound && only.is_none() => continue,
                    opened => opened?,
                };
                let tags = list.tags_of(number).into_iter().map(str::to_owned).collect();
                copied.epochs.push(self.copy_one(&epoch, tags, to, to_machine, &mut last)?);
            }
        }
        on_epoch(total, total);
        Ok(copied)
    }

    /// Which epochs of a machine another repository has, by their numbers here and there; and the newest of them with
    /// its original, if the copy is that machine's newest epoch and the original still exists.
    fn copies_in(
        &self,
        to: &EpochStore,
        machine: &Arc<str>,
        to_machine: &str,
    ) -> Result<(BTreeMap<u64, u64>, Option<(Epoch, u64)>)> {
        let mut known = BTreeMap::new();
        let Some(head) = to.repository().head(&to_machine.into())? else { return Ok((known, None)) };
        let state = to.repository().state(&head, &mut |_, _| {})?;
        for record in state.epochs.values() {
            let of = CopyOf::read(&commit_of(record)?.notes);
            if let Some(of) = of.filter(|of| of.repository == *self.repository().id() && *of.machine == **machine) {
                known.insert(of.epoch, record.seq);
            }
        }
        let last = match known.iter().next_back() {
            Some((here, there)) if head.record.latest_epoch == *there => {
                let name = EpochName { machine: machine.clone(), which: Some(Which::Number(*here)) };
                self.epoch(&name).ok().map(|epoch| (epoch, *there))
            }
            None if head.record.latest_epoch > 0 => {
                return Err(Error::conflict(format!(
                    "{to_machine} in {} has epochs of its own",
                    to.repository().url()
                ))
                .hint("copy to another name: --as NAME"));
            }
            _ => None,
        };
        Ok((known, last))
    }

    fn copy_one(
        &self,
        epoch: &Epoch,
        tags: Vec<String>,
        to: &EpochStore,
        to_machine: &str,
        last: &mut Option<(Epoch, u64)>,
    ) -> Result<CopiedEpoch> {
        let commit = epoch.commit();
        let of = CopyOf {
            repository: *self.repository().id(),
            machine: epoch.machine().to_string(),
            epoch: epoch.number(),
            time_ns: epoch.record().time_ns,
        };
        let mut notes = commit.notes.clone();
        notes.retain(|(name, _)| name != COPY_NOTE);
        notes.push(of.note());
        let parent = last.as_ref().map(|(_, there)| *there);
        let options = CommitOptions { message: commit.message.clone(), tags, notes, parent, ..Default::default() };
        let mut builder = to.begin_commit(to_machine, options)?;
        for entry in epoch.manifest().entries() {
            let EntryKind::Stream(image) = &entry.kind else {
                builder.add_entry(entry.clone())?;
                continue;
            };
            let name = format!("{}:{}", epoch.name(), entry.path.escape_ascii());
            let source = StoredSource { name, epoch, image };
            let before = last.as_ref().and_then(|(before, _)| before.manifest().stream(&entry.path));
            let dirty = before.map(|before| dirty(epoch, before, image)).transpose()?;
            builder.add_stream(&entry.path, entry.attributes.clone(), &source, dirty.as_ref())?;
        }
        let committed = builder.finish()?;
        // The digest covers every page of every stream, wherever they lie.
        if commit_of(&committed.record)?.digest != commit.digest {
            to.drop_epochs(&committed.machine, &[committed.epoch].into())?;
            return Err(Error::damaged(format!("the copy of {} came out different, and was dropped", epoch.name()))
                .hint("`epochfs verify` in both repositories tells where the damage is"));
        }
        *last = Some((epoch.clone(), committed.epoch));
        Ok(CopiedEpoch {
            from: epoch.number(),
            to: committed.epoch,
            read_bytes: committed.counts.read_bytes,
            new_pages: committed.counts.new_pages,
            stored_bytes: committed.stored_bytes,
        })
    }
}
