//! A frozen file as the commit reads it.

use std::ops::Range;
use std::sync::Arc;

use epochfs_format::{Image, PAGE_SIZE};

use super::file::FrozenLayer;
use super::layer::Content;
use super::spool::Spool;
use crate::epoch::Source;
use crate::epoch::nodes::Nodes;
use crate::epoch::reader::SharedImage;
use crate::error::Result;

const SIZE: u64 = PAGE_SIZE as u64;

pub struct FrozenSource<'a> {
    pub name: String,
    pub length: u64,
    pub layer: Option<&'a Arc<FrozenLayer>>,
    pub base: &'a Image,
    pub spool: &'a Spool,
    pub nodes: &'a Nodes,
}

impl FrozenSource<'_> {
    fn base(&self) -> SharedImage<'_> {
        SharedImage { nodes: self.nodes, image: self.base }
    }

    /// Reads a run of pages that lie in no layer.
    fn read_base(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let count = self.base().read_at(offset, buffer)?;
        buffer[count..].fill(0);
        Ok(())
    }
}

impl Source for FrozenSource<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> u64 {
        self.length
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let spooled = self.layer.and_then(|layer| layer.read().next_page(from / SIZE));
        let spooled = spooled.map(|page| (page * SIZE).max(from)..(page + 1) * SIZE);
        let base = self.base().next_data(from)?;
        let next = match (spooled, base) {
            (Some(spooled), Some(base)) if spooled.start <= base.start => Some(spooled),
            (Some(spooled), Some(base)) => Some(base.start..base.end.min(spooled.start)),
            (spooled, base) => spooled.or(base),
        };
        Ok(next.map(|range| range.start..range.end.min(self.length)).filter(|range| !range.is_empty()))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let Some(layer) = self.layer else { return self.read_base(offset, buffer) };
        let layer = layer.read();
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            let page = at / SIZE;
            // Pages that lie in a row are read at once.
            let run_max = (end.div_ceil(SIZE) - page) as usize;
            let (run, slots) = match layer.get(page) {
                Some(Content::Zeros) => (1, None),
                Some(Content::Spooled(first)) => {
                    let mut slots = vec![first];
                    while slots.len() < run_max {
                        match layer.pages.get(&(page + slots.len() as u64)) {
                            Some(next) if next.number == first.number + slots.len() as u32 => slots.push(*next),
                            _ => break,
                        }
                    }
                    (slots.len(), Some(Some(slots)))
                }
                None => {
                    let mut run = 1;
                    while run < run_max && layer.get(page + run as u64).is_none() {
                        run += 1;
                    }
                    (run, Some(None))
                }
            };
            let until = end.min((page + run as u64) * SIZE);
            let part = &mut buffer[(at - offset) as usize..(until - offset) as usize];
            match slots {
                None => part.fill(0),
                Some(None) => self.read_base(at, part)?,
                Some(Some(slots)) => {
                    let checks = slots.iter().map(|slot| slot.check);
                    if at.is_multiple_of(SIZE) && part.len() == slots.len() * PAGE_SIZE {
                        self.spool.read(slots[0].number, checks, part)?;
                    } else {
                        let mut whole = vec![0; slots.len() * PAGE_SIZE];
                        self.spool.read(slots[0].number, checks, &mut whole)?;
                        let within = (at % SIZE) as usize;
                        part.copy_from_slice(&whole[within..within + part.len()]);
                    }
                }
            }
            at = until;
        }
        Ok(())
    }
}
