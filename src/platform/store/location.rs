//! Where a repository is: in a directory, or below a prefix in a bucket.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cloud::{self, Variables};
use super::key::check_key;
use super::{LocalStore, Store};
use crate::error::{Error, Result};
use crate::platform::files::RealFiles;

/// The place of a repository, as its URL names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    Directory(PathBuf),
    Bucket(BucketUrl),
}

/// `s3://bucket/prefix` and the like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketUrl {
    pub service: Service,
    pub bucket: String,
    /// Without slashes at its ends; empty for the whole bucket.
    pub prefix: String,
}

/// The interface that a bucket's service speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    S3,
    GoogleCloud,
    Azure,
}

impl Service {
    const ALL: [Self; 3] = [Self::S3, Self::GoogleCloud, Self::Azure];

    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::GoogleCloud => "gs",
            Self::Azure => "az",
        }
    }
}

impl fmt::Display for BucketUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.service.scheme(), self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

impl fmt::Display for Location {
    /// The directory's path, or the bucket's URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Bucket(url) => url.fmt(f),
        }
    }
}

impl Location {
    /// Takes a path or a URL.
    pub fn parse(url: &str) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once("://") else { return Ok(Self::Directory(url.into())) };
        if scheme == "file" {
            return match rest.starts_with('/') {
                true => Ok(Self::Directory(rest.into())),
                false => Err(Error::usage(format!("{url}: a file:// URL has an absolute path behind it"))
                    .hint("for example file:///srv/epochs")),
            };
        }
        match Service::ALL.into_iter().find(|service| service.scheme() == scheme) {
            Some(service) => BucketUrl::parse(service, rest).map(Self::Bucket),
            None => Err(Error::usage(format!("{scheme}://: repositories of this kind are not supported"))
                .hint("give a directory, a file:// URL, or a bucket as s3://BUCKET/PREFIX, gs:// or az://")),
        }
    }

    /// The directory, if it is in one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) => Some(path),
            Self::Bucket(_) => None,
        }
    }

    /// The same place as seen from any working directory.
    pub fn absolute(&self) -> Result<Self> {
        match self {
            Self::Directory(path) => match std::path::absolute(path) {
                Ok(absolute) => Ok(Self::Directory(absolute)),
                Err(error) => Err(Error::io(format!("the path {}", path.display()), error)),
            },
            Self::Bucket(_) => Ok(self.clone()),
        }
    }

    /// The URL by which any process finds it.
    pub fn url(&self) -> Result<String> {
        match self.absolute()? {
            Self::Directory(path) => match path.to_str() {
                Some(text) => Ok(format!("file://{text}")),
                None => Err(Error::usage(format!("the repository {}: its path is not text", path.display()))),
            },
            Self::Bucket(url) => Ok(url.to_string()),
        }
    }

    /// Opens the store there. A directory must exist; a bucket is asked when it is first used.
    pub fn open(&self) -> Result<Arc<dyn Store>> {
        self.open_with(&Variables::of_process())
    }

    /// The same, with other variables than those of this process's environment.
    pub fn open_with(&self, variables: &Variables) -> Result<Arc<dyn Store>> {
        match self {
            Self::Directory(path) => Ok(Arc::new(LocalStore::open(path, Arc::new(RealFiles))?)),
            Self::Bucket(url) => Ok(Arc::new(cloud::connect(url, variables)?)),
        }
    }
}

impl BucketUrl {
    fn parse(service: Service, rest: &str) -> Result<Self> {
        let scheme = service.scheme();
        if rest.contains('@') {
            // It may hold a secret, so it is not repeated.
            return Err(Error::usage(format!("a {scheme}:// URL names a bucket and a prefix, and no user"))
                .hint("give credentials in the environment, or in the files that the service's own tools use"));
        }
        let refuse = |why: &str| {
            Err(Error::usage(format!("{scheme}://{rest}: {why}")).hint(format!("for example {scheme}://bucket/epochs")))
        };
        if rest.contains(['?', '#']) {
            return refuse("region, endpoint and the like come from the environment, not from the URL");
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let is_named = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if bucket.is_empty() || bucket.len() > 255 || !bucket.bytes().all(is_named) {
            return refuse("it names no bucket");
        }
        let prefix = prefix.trim_end_matches('/');
        if !prefix.is_empty() {
            check_key(prefix).map_err(|error| error.context(format!("{scheme}://{rest}")))?;
        }
        Ok(Self { service, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn directories_and_buckets_are_told_apart() {
        let place = |url: &str| Location::parse(url).unwrap();
        assert_eq!(place("/srv/epochs").directory(), Some(Path::new("/srv/epochs")));
        assert_eq!(place("file:///srv/epochs"), place("/srv/epochs"));
        assert!(place("relative").url().unwrap().starts_with("file:///"));
        for (given, shown) in [
            ("s3://b", "s3://b"),
            ("s3://b/", "s3://b"),
            ("s3://my.bucket-1/a/b/", "s3://my.bucket-1/a/b"),
            ("gs://b/p", "gs://b/p"),
            ("az://b/p", "az://b/p"),
        ] {
            assert_eq!(place(given).url().unwrap(), shown);
            assert_eq!(place(given).to_string(), shown);
            assert_eq!(place(given).directory(), None);
        }
    }

    #[test]
    fn what_is_no_place_is_refused_and_secrets_are_not_repeated() {
        for url in
            ["s3://", "s3:///p", "s3://b/../c", "s3://b//c", "s3://b/p?x=1", "ftp://h/p", "file://srv", "s3://a b"]
        {
            assert_eq!(Location::parse(url).unwrap_err().kind(), Kind::Usage, "{url}");
        }
        let error = Location::parse("s3://key:topsecret@bucket/p").unwrap_err();
        assert!(!error.to_string().contains("topsecret"), "{error}");
    }
}
