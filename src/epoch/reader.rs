//! Reading epochs.

use std::cell::RefCell;
use std::ops::Range;
use std::slice;
use std::sync::Arc;

use epochfs_format::{EntryKind, Image, Manifest, ManifestEntry, PAGE_SIZE, Page, Record};

use super::fetch::{Fetcher, Wanted};
use super::nodes::Nodes;
use super::tree::{LEAF_PAGES, leaf, leaf_root, next_leaf, page_count};
use super::view::commit_of;
use super::window::Window;
use crate::error::{Error, Result};
use crate::repo::Hold;

/// An open epoch. Immutable; cheap to clone.
#[derive(Clone)]
pub struct Epoch {
    nodes: Arc<Nodes>,
    record: Arc<Record>,
    manifest: Arc<Manifest>,
    /// Keeps what it refers to from being collected.
    hold: Arc<Hold>,
}

impl Epoch {
    pub(super) fn new(nodes: Arc<Nodes>, record: Arc<Record>, manifest: Arc<Manifest>, hold: Arc<Hold>) -> Self {
        Self { nodes, record, manifest, hold }
    }

    /// What keeps it readable, for whoever goes on reading its streams without it.
    pub(crate) fn hold(&self) -> &Arc<Hold> {
        &self.hold
    }

    pub fn machine(&self) -> &Arc<str> {
        &self.record.machine
    }

    pub fn number(&self) -> u64 {
        self.record.seq
    }

    pub fn record(&self) -> &Record {
        &self.record
    }

    pub fn commit(&self) -> &epochfs_format::Commit {
        commit_of(&self.record).expect("an epoch is only opened from a commit record")
    }

    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    pub(crate) fn nodes(&self) -> &Arc<Nodes> {
        &self.nodes
    }

    /// The epoch's name, as commands take it.
    pub fn name(&self) -> String {
        format!("{}@{}", self.record.machine, self.record.seq)
    }

    /// Opens one of its streams.
    pub fn stream(&self, path: &[u8]) -> Result<StreamReader> {
        Ok(self.reader(self.image(path)?))
    }

    /// What one of its streams holds.
    pub(crate) fn image(&self, path: &[u8]) -> Result<&Image> {
        match self.manifest.get(path) {
            Some(ManifestEntry { kind: EntryKind::Stream(image), .. }) => Ok(image),
            Some(_) => Err(Error::usage(format!("{}: {} is not a stream", self.name(), path.escape_ascii()))),
            None => Err(Error::not_found(format!("{} has no stream {}", self.name(), path.escape_ascii()))
                .hint(format!("`epochfs show {}` lists its streams", self.name()))),
        }
    }

    pub(crate) fn reader(&self, image: &Image) -> StreamReader {
        let hold = Some(self.hold.clone());
        StreamReader { nodes: self.nodes.clone(), image: image.clone(), fetcher: Fetcher::default(), _hold: hold }
    }
}

/// Reads a stream. One a thread.
pub struct StreamReader {
    nodes: Arc<Nodes>,
    image: Image,
    fetcher: Fetcher,
    /// Keeps the epoch readable for as long as this is.
    _hold: Option<Arc<Hold>>,
}

impl StreamReader {
    pub fn len(&self) -> u64 {
        self.image.length
    }

    pub fn is_empty(&self) -> bool {
        self.image.length == 0
    }

    /// Fills the buffer from this offset, up to the stream's end; returns how much that was. Every page is proven
    /// against its hash; after an error the buffer holds nothing useful.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        read_image_at(&self.nodes, &self.image, &mut self.fetcher, offset, buffer)
    }

    /// The next run of pages at or after `from` that are stored, as a byte range within the stream.
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        next_data(&self.nodes, &self.image, from)
    }
}

thread_local! {
    static FETCHER: RefCell<Fetcher> = RefCell::default();
}

/// An image that any thread reads.
pub struct SharedImage<'a> {
    pub nodes: &'a Nodes,
    pub image: &'a Image,
}

impl SharedImage<'_> {
    /// As [`StreamReader::read_at`].
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        FETCHER.with_borrow_mut(|fetcher| read_image_at(self.nodes, self.image, fetcher, offset, buffer))
    }

    /// As [`StreamReader::next_data`].
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        next_data(self.nodes, self.image, from)
    }

    /// The tree will be asked for these pages soon. Each leaf is named once, or a few times.
    pub fn will_need_nodes(&self, pages: impl Iterator<Item = u64>) -> Result<()> {
        for page in pages {
            if let Some(root) = leaf_root(self.nodes, self.image, page / LEAF_PAGES)? {
                self.nodes.will_need(&root);
            }
        }
        Ok(())
    }

    /// Reads pages, whose numbers are in order, wherever they are, out of a window where it has them. What is not stored
    /// is zeros.
    pub fn read_pages(&self, numbers: &[u64], window: &Window, pages: &mut [Page]) -> Result<()> {
        assert_eq!(numbers.len(), pages.len(), "a page for each number");
        let mut wanted = Vec::with_capacity(numbers.len());
        let leaves = || numbers.chunk_by(|a, b| a / LEAF_PAGES == b / LEAF_PAGES).map(|group| group[0]);
        if leaves().nth(1).is_some() {
            self.will_need_nodes(leaves())?;
        }
        let mut at = 0;
        for group in numbers.chunk_by(|a, b| a / LEAF_PAGES == b / LEAF_PAGES) {
            let leaf = leaf(self.nodes, self.image, group[0] / LEAF_PAGES)?;
            for number in group {
                let slot = (number % LEAF_PAGES) as usize;
                let stored = leaf.as_ref().and_then(|leaf| Some((leaf.node.hash(slot)?, leaf.node.place(slot)?)));
                match stored {
                    // As if they lay side by side.
                    Some((hash, place)) => {
                        let place = window.find(hash).cloned().unwrap_or(place);
                        wanted.push(Wanted { page: at as u64, hash: *hash, place });
                    }
                    None => pages[at].fill(0),
                }
                at += 1;
            }
        }
        FETCHER.with_borrow_mut(|fetcher| fetcher.fetch(self.nodes.objects(), wanted, 0, pages))
    }
}

fn read_image_at(nodes: &Nodes, image: &Image, fetcher: &mut Fetcher, offset: u64, buffer: &mut [u8]) -> Result<usize> {
    let end = image.length.min(offset.saturating_add(buffer.len() as u64));
    if offset >= end {
        return Ok(0);
    }
    let len = (end - offset) as usize;
    let buffer = &mut buffer[..len];
    let size = PAGE_SIZE as u64;
    let mut at = 0;
    while at < len {
        let rest = &mut buffer[at..];
        let (number, within) = ((offset + at as u64) / size, ((offset + at as u64) % size) as usize);
        if within == 0 && rest.len() >= PAGE_SIZE {
            let (pages, _) = rest.as_chunks_mut();
            fill_pages(nodes, image, fetcher, number, pages)?;
            at += pages.len() * PAGE_SIZE;
        } else {
            let mut page = [0; PAGE_SIZE];
            fill_pages(nodes, image, fetcher, number, slice::from_mut(&mut page))?;
            let part = rest.len().min(PAGE_SIZE - within);
            rest[..part].copy_from_slice(&page[within..within + part]);
            at += part;
        }
    }
    Ok(len)
}

fn next_data(nodes: &Nodes, image: &Image, from: u64) -> Result<Option<Range<u64>>> {
    // Within the last page, but past the end of the stream.
    if from >= image.length {
        return Ok(None);
    }
    let size = PAGE_SIZE as u64;
    let mut page = from / size;
    let mut run: Option<Range<u64>> = None;
    while page < page_count(image.length) {
        let Some((index, root)) = next_leaf(nodes, image, page / LEAF_PAGES)? else { break };
        let first = index * LEAF_PAGES;
        if run.is_some() && page < first {
            break;
        }
        let leaf = nodes.load(&root, 0)?;
        let mut slot = page.saturating_sub(first) as usize;
        if run.is_none() {
            match leaf.node.next_slot(slot) {
                None => {
                    page = first + LEAF_PAGES;
                    continue;
                }
                Some(found) => {
                    slot = found;
                    run = Some(first + found as u64..first + found as u64);
                }
            }
        }
        let run = run.as_mut().expect("it was just begun");
        while slot < LEAF_PAGES as usize && leaf.node.hash(slot).is_some() {
            slot += 1;
        }
        run.end = first + slot as u64;
        if slot < LEAF_PAGES as usize {
            break;
        }
        page = first + LEAF_PAGES;
    }
    Ok(run.map(|run| (run.start * size).max(from)..(run.end * size).min(image.length)))
}

/// Fills pages with those of the image from number `first` on.
pub(super) fn fill_pages(
    nodes: &Nodes,
    image: &Image,
    fetcher: &mut Fetcher,
    first: u64,
    pages: &mut [Page],
) -> Result<()> {
    let wanted = wanted_pages(nodes, image, first..first + pages.len() as u64)?;
    let mut next = 0;
    for slot in wanted.iter().map(|wanted| (wanted.page - first) as usize) {
        pages[next..slot].as_flattened_mut().fill(0);
        next = slot + 1;
    }
    pages[next..].as_flattened_mut().fill(0);
    fetcher.fetch(nodes.objects(), wanted, first, pages)
}

/// The stored pages of this page range, in order.
pub(super) fn wanted_pages(nodes: &Nodes, image: &Image, pages: Range<u64>) -> Result<Vec<Wanted>> {
    let mut wanted = Vec::new();
    let mut index = pages.start / LEAF_PAGES;
    while index * LEAF_PAGES < pages.end {
        if let Some(leaf) = leaf(nodes, image, index)? {
            let first = index * LEAF_PAGES;
            let within = pages.start.saturating_sub(first) as usize..(pages.end - first).min(LEAF_PAGES) as usize;
            wanted.extend(leaf.node.iter_range(within).map(|slot| Wanted {
                page: first + slot.slot as u64,
                hash: *slot.hash,
                place: slot.place(),
            }));
        }
        index += 1;
    }
    Ok(wanted)
}

/// A whole image in memory; only for small ones.
pub(super) fn read_image(nodes: &Arc<Nodes>, image: &Image) -> Result<Vec<u8>> {
    const MANIFEST_LEN_MAX: u64 = 1 << 30;
    if image.length > MANIFEST_LEN_MAX {
        return Err(Error::damaged(format!("a manifest of {} bytes", image.length)));
    }
    let mut reader =
        StreamReader { nodes: nodes.clone(), image: image.clone(), fetcher: Fetcher::default(), _hold: None };
    let mut bytes = vec![0; image.length as usize];
    reader.read_at(0, &mut bytes)?;
    Ok(bytes)
}
