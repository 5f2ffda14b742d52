//! Manifests: the complete list of what an epoch holds, sorted by path.

use crate::error::{FormatError, Result, invalid};
use crate::name::{STREAM_PATH_LEN_MAX, check_stream_path};
use crate::page::Hash;
use crate::reference::{ObjectRef, Place};
use crate::wire::{Put, Reader};

const WHAT: &str = "manifest";
const KIND_STREAM: u8 = 1;
const KIND_DIRECTORY: u8 = 2;
const KIND_SYMLINK: u8 = 3;

/// The longest image: no file can be longer.
pub const IMAGE_LEN_MAX: u64 = i64::MAX as u64;

/// The longest value of an extended attribute that Linux knows.
pub(crate) const EXTENDED_VALUE_LEN_MAX: usize = 64 << 10;

/// Path length, kind, mode, owner, group, time and attribute count: what each entry takes at least.
const ENTRY_LEN_MIN: usize = 2 + 1 + 4 + 4 + 4 + 8 + 2;

/// Where a tree's root node lies, and its logical digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub digest: Hash,
    pub place: Place,
}

/// A byte image: its length, and its tree unless all of it is zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pub length: u64,
    pub root: Option<Root>,
}

impl Image {
    /// The digest of the image's content, wherever it lies.
    pub fn digest(&self) -> Hash {
        let mut hasher = blake3::Hasher::new_derive_key("EpochFS v1 stream digest");
        hasher.update(&self.length.to_le_bytes());
        if let Some(root) = &self.root {
            hasher.update(&root.digest);
        }
        *hasher.finalize().as_bytes()
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.length > IMAGE_LEN_MAX {
            return invalid(WHAT, "a stream is longer than any file can be");
        }
        if self.length == 0 && self.root.is_some() {
            return invalid(WHAT, "an empty stream has a tree");
        }
        Ok(())
    }

    pub(crate) fn put(&self, own: Option<&ObjectRef>, out: &mut Vec<u8>) {
        out.put_u64(self.length);
        out.put_flag(self.root.is_some());
        if let Some(root) = &self.root {
            out.put(&root.digest);
            root.place.put(own, out);
        }
    }

    pub(crate) fn read(own: Option<&ObjectRef>, from: &mut Reader<'_>) -> Result<Self> {
        let length = from.u64()?;
        let root =
            if from.flag()? { Some(Root { digest: from.array()?, place: Place::read(own, from)? }) } else { None };
        let image = Self { length, root };
        image.check()?;
        Ok(image)
    }
}

/// What a manifest entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    Stream(Image),
    Directory,
    Symlink(Vec<u8>),
}

/// A file's metadata, kept as it was; no digest depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, as in `chmod`.
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    /// Time of the last change of content, in nanoseconds since 1970.
    pub modified_ns: i64,
    /// Extended attributes, sorted by name.
    pub extended: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestEntry {
    pub path: Vec<u8>,
    pub attributes: Attributes,
    pub kind: EntryKind,
}

impl ManifestEntry {
    /// Refuses what a reader of the manifest would refuse.
    fn check(&self) -> Result<()> {
        const WHAT: &str = "file";
        let refuse = |why| Err(FormatError::Name { what: WHAT, why });
        check_stream_path(&self.path)?;
        let extended = &self.attributes.extended;
        if extended.len() > usize::from(u16::MAX) {
            return refuse("it has more than 65,535 extended attributes");
        }
        if extended.iter().any(|(name, _)| name.is_empty() || name.len() > 255 || name.contains(&0)) {
            return refuse("an extended attribute's name is empty, longer than 255 bytes, or holds a zero byte");
        }
        if extended.iter().any(|(_, value)| value.len() > EXTENDED_VALUE_LEN_MAX) {
            return refuse("an extended attribute is longer than 64 KiB");
        }
        if !extended.is_sorted_by(|a, b| a.0 < b.0) {
            return refuse("its extended attributes are out of order, or two have the same name");
        }
        match &self.kind {
            EntryKind::Stream(image) => image.check(),
            EntryKind::Directory => Ok(()),
            EntryKind::Symlink(target) => {
                if target.is_empty() || target.len() > STREAM_PATH_LEN_MAX || target.contains(&0) {
                    return refuse("a symbolic link's target is not a path");
                }
                Ok(())
            }
        }
    }
}

/// Everything that an epoch holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<ManifestEntry>,
}

impl Manifest {
    /// Sorts the entries and their extended attributes, and refuses what could not be decoded again.
    pub fn new(mut entries: Vec<ManifestEntry>) -> Result<Self> {
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        for entry in &mut entries {
            entry.attributes.extended.sort();
            entry.check()?;
        }
        Self::checked(entries)
    }

    /// The manifest of these entries, each of them checked, if they go together.
    fn checked(entries: Vec<ManifestEntry>) -> Result<Self> {
        if !entries.is_sorted_by(|a, b| a.path < b.path) {
            return invalid(WHAT, "its paths are out of order, or two are the same");
        }
        let manifest = Self { entries };
        // A directory need not be listed for what is in it; what is listed with something in it is a directory.
        for entry in &manifest.entries {
            let slashes = entry.path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
            for (index, _) in slashes {
                if manifest.get(&entry.path[..index]).is_some_and(|above| above.kind != EntryKind::Directory) {
                    return invalid(WHAT, "a path leads through what is not a directory");
                }
            }
        }
        Ok(manifest)
    }

    pub fn entries(&self) -> &[ManifestEntry] {
        &self.entries
    }

    pub fn get(&self, path: &[u8]) -> Option<&ManifestEntry> {
        self.entries.binary_search_by(|entry| entry.path.as_slice().cmp(path)).ok().map(|index| &self.entries[index])
    }

    /// The image of the stream at this path.
    pub fn stream(&self, path: &[u8]) -> Option<&Image> {
        match &self.get(path)?.kind {
            EntryKind::Stream(image) => Some(image),
            _ => None,
        }
    }

    /// Every stream with its path.
    pub fn streams(&self) -> impl Iterator<Item = (&[u8], &Image)> {
        self.entries.iter().filter_map(|entry| match &entry.kind {
            EntryKind::Stream(image) => Some((entry.path.as_slice(), image)),
            _ => None,
        })
    }

    /// The sum of the streams' lengths.
    pub fn logical_len(&self) -> u64 {
        self.streams().fold(0, |sum, (_, image)| sum.saturating_add(image.length))
    }

    /// The digest of all content: paths, kinds, lengths and bytes.
    pub fn digest(&self) -> Hash {
        let mut hasher = blake3::Hasher::new_derive_key("EpochFS v1 epoch digest");
        for entry in &self.entries {
            hasher.update(&(entry.path.len() as u64).to_le_bytes());
            hasher.update(&entry.path);
            match &entry.kind {
                EntryKind::Stream(image) => {
                    hasher.update(&[KIND_STREAM]);
                    hasher.update(&image.digest());
                }
                EntryKind::Directory => {
                    hasher.update(&[KIND_DIRECTORY]);
                }
                EntryKind::Symlink(target) => {
                    hasher.update(&[KIND_SYMLINK]);
                    hasher.update(&(target.len() as u64).to_le_bytes());
                    hasher.update(target);
                }
            }
        }
        *hasher.finalize().as_bytes()
    }

    /// Encodes the manifest. References to `own`, the object it will be part of, are left relative.
    pub fn encode(&self, own: Option<&ObjectRef>) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u32(u32::try_from(self.entries.len()).expect("an epoch holds fewer than 4 billion files"));
        for entry in &self.entries {
            out.put_medium(&entry.path);
            out.put_u8(match entry.kind {
                EntryKind::Stream(_) => KIND_STREAM,
                EntryKind::Directory => KIND_DIRECTORY,
                EntryKind::Symlink(_) => KIND_SYMLINK,
            });
            let attributes = &entry.attributes;
            out.put_u32(attributes.mode);
            out.put_u32(attributes.owner);
            out.put_u32(attributes.group);
            out.put_i64(attributes.modified_ns);
            out.put_u16(u16::try_from(attributes.extended.len()).expect("the kernel bounds a file's attributes"));
            for (name, value) in &attributes.extended {
                out.put_short(name);
                out.put_long(value);
            }
            match &entry.kind {
                EntryKind::Stream(image) => image.put(own, &mut out),
                EntryKind::Directory => {}
                EntryKind::Symlink(target) => out.put_medium(target),
            }
        }
        out
    }

    /// Decodes a manifest that is part of the object `own`, or of none.
    pub fn decode(bytes: &[u8], own: Option<&ObjectRef>) -> Result<Self> {
        let mut from = Reader::new(WHAT, bytes);
        let count = from.u32()? as usize;
        let mut entries: Vec<ManifestEntry> = Vec::with_capacity(from.bounded(count, ENTRY_LEN_MIN)?);
        for _ in 0..count {
            let path = from.medium_bytes()?.to_vec();
            let kind = from.u8()?;
            let mut attributes = Attributes {
                mode: from.u32()?,
                owner: from.u32()?,
                group: from.u32()?,
                modified_ns: from.i64()?,
                extended: Vec::new(),
            };
            let extended = usize::from(from.u16()?);
            attributes.extended.reserve(from.bounded(extended, 1 + 4)?);
            for _ in 0..extended {
                let name = from.short_bytes()?.to_vec();
                attributes.extended.push((name, from.long_bytes()?.to_vec()));
            }
            let kind = match kind {
                KIND_STREAM => EntryKind::Stream(Image::read(own, &mut from)?),
                KIND_DIRECTORY => EntryKind::Directory,
                KIND_SYMLINK => EntryKind::Symlink(from.medium_bytes()?.to_vec()),
                _ => return invalid(WHAT, "an entry's kind is unknown"),
            };
            let entry = ManifestEntry { path, attributes, kind };
            entry.check()?;
            entries.push(entry);
        }
        from.end()?;
        Self::checked(entries)
    }
}
