//! Pages that restores need together, stored together once more, where they were scattered over many objects.
//!
//! A window is nothing but packs. Which pages an epoch has is said by its tree alone; a window is only another place where
//! a page with the wanted hash may lie.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use epochfs_format::{Block, BlockKind, Hash, Image, ObjectRef, PAGE_SIZE, Place, TRACE_WINDOWS_MAX};

use super::reader::wanted_pages;
use super::{Epoch, nodes::Nodes};
use crate::error::{Error, Result};
use crate::repo::PackWriter;

/// Pages that lie in no more objects than this are read quickly enough where they are.
const SCATTERED_FROM_OBJECTS: usize = 32;

/// Pages whose blocks are read together while a window is written.
const PAGES_AT_ONCE: usize = 512;

/// Where else pages lie.
#[derive(Default)]
pub struct Window {
    places: HashMap<Hash, Place>,
}

impl Window {
    /// The window that these packs are.
    pub fn open(nodes: &Nodes, packs: &[[u8; 16]]) -> Result<Self> {
        let mut places = HashMap::new();
        for id in packs {
            let object = ObjectRef::Pack(*id);
            let footer = nodes.objects().footer(&object)?;
            for entry in footer.iter().filter(|entry| entry.kind == BlockKind::Page) {
                places.insert(entry.hash, Place { object: object.clone(), offset: entry.offset, len: entry.len });
            }
        }
        Ok(Self { places })
    }

    pub fn find(&self, hash: &Hash) -> Option<&Place> {
        self.places.get(hash)
    }

    /// Whether pages of an image, without those that are in the window, are scattered over many objects.
    pub fn leaves_scattered(&self, nodes: &Nodes, image: &Image, runs: &[Range<u64>]) -> Result<bool> {
        let mut objects = BTreeSet::new();
        for run in runs {
            for wanted in wanted_pages(nodes, image, run.clone())? {
                if self.find(&wanted.hash).is_none() {
                    objects.insert(wanted.place.object);
                }
            }
            if objects.len() > SCATTERED_FROM_OBJECTS {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Stores these pages of an epoch's image once more, in this order; returns the packs. Nothing refers to them but a
    /// trace.
    pub fn write(epoch: &Epoch, image: &Image, runs: &[Range<u64>]) -> Result<Vec<[u8; 16]>> {
        let nodes: &Arc<Nodes> = epoch.nodes();
        let mut packs = PackWriter::new(nodes.objects().clone(), Box::new(|_, _| Ok(())));
        let mut wanted = Vec::new();
        for run in runs {
            wanted.extend(wanted_pages(nodes, image, run.clone())?);
        }
        let mut stored = BTreeSet::new();
        wanted.retain(|wanted| stored.insert(wanted.hash));
        for group in wanted.chunks(PAGES_AT_ONCE) {
            let mut blocks = vec![Bytes::new(); group.len()];
            let mut order: Vec<usize> = (0..group.len()).collect();
            order.sort_by_key(|at| (&group[*at].place.object, group[*at].place.offset));
            for at in &order {
                nodes.objects().will_need_block(&group[*at].place);
            }
            for at in order {
                let block = nodes.objects().read(&group[at].place)?;
                // What is damaged must not be stored as if it were not.
                Block::only(&block, BlockKind::Page).map_err(Error::from)?;
                blocks[at] = block;
            }
            for (wanted, block) in group.iter().zip(blocks) {
                packs.push_page(wanted.hash, &block)?;
            }
        }
        let (packs, _) = packs.finish(false)?;
        let ids: Vec<[u8; 16]> = packs.into_iter().map(|(id, _)| id).collect();
        if ids.len() > TRACE_WINDOWS_MAX {
            return Err(Error::usage(format!("a window of {} pages of {PAGE_SIZE} bytes", wanted.len())));
        }
        Ok(ids)
    }
}
