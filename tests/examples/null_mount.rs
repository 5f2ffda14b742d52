//! A file system that does nothing but answer: what any honest one on the same library is measured against.
//!
//! `cargo run --release --example null_mount -- MOUNTPOINT --size 1G --content FILE`
//!
//! It has one file, `memory`. A read is answered straight from memory, a write is copied into memory, and nothing else
//! happens. Threads, flags and the kernel's settings of the mount are arguments, so that they can be those of the file
//! system that is measured. Says `mounted` on stderr when it is ready, and ends when it is unmounted.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, UNIX_EPOCH};

use clap::Parser;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, TimeOrNow, WriteFlags,
};

const FILE: INodeNo = INodeNo(2);
const FILE_NAME: &str = "memory";
const FOREVER: Duration = Duration::from_secs(3600);

/// Each piece has a lock of its own, and no request but an unaligned one spans two.
const PIECE: usize = 1 << 20;

#[derive(Parser)]
struct Arguments {
    mountpoint: PathBuf,
    /// The file's length in MiB.
    #[arg(long, default_value_t = 1024)]
    size_mib: usize,
    /// What the file holds; zeros behind its end.
    #[arg(long)]
    content: Option<PathBuf>,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// One channel to the kernel for all threads instead of one each.
    #[arg(long)]
    one_channel: bool,
    #[arg(long, default_value_t = 1 << 20)]
    max_write: u32,
    #[arg(long, default_value_t = 256 << 10)]
    max_read: u32,
    #[arg(long, default_value_t = 64)]
    max_background: u16,
    /// Drop what the kernel holds of the file when it is opened.
    #[arg(long)]
    no_keep_cache: bool,
    /// Settings of the mount in /sys/class/bdi, as NAME=VALUE.
    #[arg(long, default_values = ["read_ahead_kb=1024", "strict_limit=0", "max_ratio=100"])]
    bdi: Vec<String>,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let null = Null {
        pieces: load(arguments.content.as_deref(), arguments.size_mib)?,
        max_write: arguments.max_write,
        max_background: arguments.max_background,
        open_flags: if arguments.no_keep_cache { FopenFlags::empty() } else { FopenFlags::FOPEN_KEEP_CACHE },
    };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("null".into()),
        MountOption::DefaultPermissions,
        MountOption::CUSTOM(format!("max_read={}", arguments.max_read)),
    ];
    config.n_threads = Some(arguments.threads);
    config.clone_fd = !arguments.one_channel;
    let session = Session::new(null, &arguments.mountpoint, &config)?;
    let running = session.spawn()?;
    for setting in &arguments.bdi {
        set_bdi(&arguments.mountpoint, setting)?;
    }
    writeln!(io::stderr(), "mounted at {}", arguments.mountpoint.display())?;
    running.join()
}

fn load(content: Option<&Path>, size_mib: usize) -> io::Result<Vec<RwLock<Vec<u8>>>> {
    let mut content = content.map(File::open).transpose()?;
    let mut pieces = Vec::with_capacity(size_mib);
    for _ in 0..size_mib {
        let mut piece = Vec::with_capacity(PIECE);
        if let Some(file) = &mut content {
            file.take(PIECE as u64).read_to_end(&mut piece)?;
        }
        // The rest is written too: memory that was never touched would be slower, and not by the file system's fault.
        piece.extend(std::iter::repeat_n(std::hint::black_box(0), PIECE - piece.len()));
        pieces.push(RwLock::new(piece));
    }
    Ok(pieces)
}

/// The kernel's settings of a mount lie under the number of its device.
fn set_bdi(mountpoint: &Path, setting: &str) -> io::Result<()> {
    let (name, value) = setting.split_once('=').ok_or(io::ErrorKind::InvalidInput)?;
    let device = std::fs::metadata(mountpoint)?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::write(format!("/sys/class/bdi/{major}:{minor}/{name}"), value)
}

struct Null {
    pieces: Vec<RwLock<Vec<u8>>>,
    max_write: u32,
    max_background: u16,
    open_flags: FopenFlags,
}

impl Null {
    fn len(&self) -> u64 {
        (self.pieces.len() * PIECE) as u64
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_file = inode == FILE;
        let size = if is_file { self.len() } else { 0 };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Null {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config.set_max_write(self.max_write).map_err(|_| io::ErrorKind::Unsupported)?;
        config.set_max_background(self.max_background).map_err(|_| io::ErrorKind::Unsupported)?;
        let _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS | InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == FILE_NAME {
            reply.entry(&FOREVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&FOREVER, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), self.open_flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let end = self.len().min(offset + u64::from(size));
        if offset >= end {
            return reply.data(&[]);
        }
        let (at, len) = (offset as usize, (end - offset) as usize);
        let first = self.pieces[at / PIECE].read().unwrap_or_else(PoisonError::into_inner);
        match first.get(at % PIECE..at % PIECE + len) {
            Some(bytes) => reply.data(bytes),
            None => {
                let mut bytes = first[at % PIECE..].to_vec();
                drop(first);
                let mut next = at / PIECE + 1;
                while bytes.len() < len {
                    let piece = self.pieces[next].read().unwrap_or_else(PoisonError::into_inner);
                    bytes.extend_from_slice(&piece[..PIECE.min(len - bytes.len())]);
                    next += 1;
                }
                reply.data(&bytes);
            }
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if offset + data.len() as u64 > self.len() {
            return reply.error(Errno::ENOSPC);
        }
        let (mut at, mut rest) = (offset as usize, data);
        while !rest.is_empty() {
            let count = rest.len().min(PIECE - at % PIECE);
            let mut piece = self.pieces[at / PIECE].write().unwrap_or_else(PoisonError::into_inner);
            piece[at % PIECE..at % PIECE + count].copy_from_slice(&rest[..count]);
            at += count;
            rest = &rest[count..];
        }
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if offset == 0 {
            let _ = reply.add(FILE, 1, FileType::RegularFile, FILE_NAME);
        }
        reply.ok();
    }
}
