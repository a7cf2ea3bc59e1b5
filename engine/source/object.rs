//! Pages of an object in a store that the crate `object_store` knows: S3 and what speaks like it, Google Cloud Storage, Azure,
//! HTTP servers, folders.

use std::future::Future;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::TryStreamExt;
use nix::sys::signal::{SigSet, SigmaskHow};
use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreScheme, parse_url_opts,
};
use percent_encoding::percent_decode_str;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use tokio::runtime::{Builder, Handle, Runtime, RuntimeFlavor};
use url::{Position, Url};

use super::{PageSource, check_granule, check_range};
use crate::error::{Error, Result, SourceFault};

/// The bytes of a ranged read unless others are asked for: large enough that a store's latency does not rule.
const GRANULE_BYTES: usize = 256 << 10;
/// How long a read may take with all its retries, unless another time is asked for: less than a vmap waits for a read, so
/// that the store's own words are told.
const DEADLINE: Duration = Duration::from_secs(10);
/// What the library would wait longer for: with these there is time to try again before the deadline.
const CLIENT_DEFAULTS: [(&str, &str); 2] = [("connect_timeout", "3 seconds"), ("timeout", "5 seconds")];

/// Says how an [`ObjectSource`] reads.
#[derive(Clone)]
pub struct ObjectOptions {
    granule_bytes: usize,
    deadline: Duration,
    settings: Vec<(String, String)>,
    runtime: Option<Handle>,
}

impl Default for ObjectOptions {
    fn default() -> Self {
        Self { granule_bytes: GRANULE_BYTES, deadline: DEADLINE, settings: Vec::new(), runtime: None }
    }
}

impl ObjectOptions {
    /// Begins with reads of 256 KiB, a deadline of 10 seconds, and the settings of the environment.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many bytes are read at once for a touch, a power of two from the page size to 4 MiB.
    #[must_use]
    pub fn granule_bytes(mut self, bytes: usize) -> Self {
        self.granule_bytes = bytes;
        self
    }

    /// Sets how long opening, and each read, may take with all retries that the library makes; after that it is an error. Keep it
    /// below the vmap's ([`FailurePolicy::deadline`](crate::FailurePolicy::deadline)), which knows no cause.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets one of the library's settings by its name, as `aws_endpoint`, `google_service_account`, `azure_storage_account_key`,
    /// `allow_http` or `timeout`. It comes before the environment's.
    #[must_use]
    pub fn set(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((key.into(), value.into()));
        self
    }

    /// Has a runtime of the caller's do the work, which must have threads of its own, instead of one with a single thread that
    /// each source starts.
    ///
    /// Whoever waits for the object must not be one of these threads, or it may wait for itself until the
    /// [deadline](ObjectOptions::deadline): so the source is opened outside of that runtime, and what runs on it must touch
    /// no page of the object that may be missing.
    #[must_use]
    pub fn runtime(mut self, handle: Handle) -> Self {
        self.runtime = Some(handle);
        self
    }
}

impl std::fmt::Debug for ObjectOptions {
    /// Names the settings, not their values: some are secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectOptions")
            .field("granule_bytes", &self.granule_bytes)
            .field("deadline", &self.deadline)
            .field("settings", &self.settings.iter().map(|(key, _)| key).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// Reads pages of an object by ranged reads, as many at a time as there are callers: the engine's workers
/// ([`EngineBuilder::workers`](crate::EngineBuilder::workers)).
///
/// Credentials, signatures, retries and time-outs are the crate `object_store`'s. The object is the one that was opened: its
/// size and etag are noted, every read asks for that etag, and an object that was replaced since is an error, never bytes of
/// both. So is an answer of another range, or of more or fewer bytes than were asked for.
///
/// A compressed image in a store is a `ZstdImage` (feature `zstd`) over one of these.
pub struct ObjectSource {
    store: Arc<dyn ObjectStore>,
    object: Arc<Object>,
    granule_bytes: usize,
    deadline: Duration,
    work: Work,
}

/// What was found when it was opened.
#[derive(Debug)]
struct Object {
    path: Path,
    len_bytes: u64,
    version: ObjectVersion,
}

/// What tells an object from one that takes its place.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ObjectVersion {
    Etag(String),
    /// Of a store without etags.
    Modified(SystemTime),
}

impl ObjectVersion {
    fn of(meta: &ObjectMeta) -> Option<Self> {
        // The library's word for a time that was not told.
        let modified = SystemTime::from(meta.last_modified);
        let told = modified != SystemTime::UNIX_EPOCH;
        meta.e_tag.clone().map(ObjectVersion::Etag).or(told.then_some(ObjectVersion::Modified(modified)))
    }

    /// The condition of a read. A weak etag never matches one, and is only compared.
    fn condition(&self) -> GetOptions {
        match self {
            ObjectVersion::Etag(etag) if !etag.starts_with("W/") => GetOptions::new().with_if_match(Some(etag.clone())),
            ObjectVersion::Etag(_) => GetOptions::new(),
            ObjectVersion::Modified(time) => GetOptions::new().with_if_unmodified_since(Some(*time)),
        }
    }
}

impl ObjectSource {
    /// Opens the object that a URL names: `s3://bucket/key`, `gs://…`, `az://…`, `http://…`, `https://…`, `file:///…`.
    ///
    /// Settings come from the environment, as the crate `object_store` names them (`AWS_…`, `GOOGLE_…`, `AZURE_…`; see
    /// `docs/operations.md`), and from [`ObjectOptions::set`]. TLS is `rustls` with `ring`, which becomes the process's default
    /// provider unless it has one. A name and a password in an `http` or `https` URL are sent as they are meant
    /// (`Authorization: Basic`); no error tells a password.
    ///
    /// # Errors
    ///
    /// * [`Error::Invalid`] (`EINVAL`): the granule is no power of two from the page size to 4 MiB; the runtime has one thread only, or
    ///   this is called within it.
    /// * [`Error::Source`]: there is no such object (`ENOENT`) or it is empty (`ENODATA`); it may not be read, or no credentials were
    ///   found (`EACCES`); the URL or a setting is not understood (`EINVAL`); the URL has a query (a signature, say), a fragment, or
    ///   a password that is of no use there, none of which a store would be asked with, or the store tells neither an etag nor a time,
    ///   so that a replaced object could not be told (`EOPNOTSUPP`); it did not answer in time (`ETIMEDOUT`); anything else (`EIO`).
    /// * [`Error::Sys`]: the runtime's thread can't be started (`EAGAIN`).
    pub fn open(url: &str, options: &ObjectOptions) -> Result<Self> {
        let refused = |name: String, fault, why: &str| Error::Source { name, fault, why: why.into() };
        let parsed = Url::parse(url)
            .map_err(|error| refused(scheme_of(url), SourceFault::NotThatFormat, &format!("it is no URL: {error}")))?;
        let name = shown(&parsed);
        let (scheme, path) = match ObjectStoreScheme::parse(&parsed) {
            Ok(found) => found,
            Err(_) => {
                return Err(match Path::from_url_path(parsed.path()) {
                    Err(error) => refused(name, SourceFault::NotThatFormat, &error.to_string()),
                    // What is what in it nobody knows.
                    Ok(_) => refused(scheme_of(url), SourceFault::NotThatFormat, "no store is known by such URLs"),
                });
            }
        };
        let lost = match &parsed {
            url if url.query().is_some() => "a query: set credentials instead of a signature; a ? in a name is %3F",
            url if url.fragment().is_some() => "a fragment: a # in a name is %23",
            url if url.password().is_some() && scheme != ObjectStoreScheme::Http => {
                "a password: set credentials instead"
            }
            _ => "",
        };
        if !lost.is_empty() {
            let why = format!("the store would be asked without what its URL has, {lost}");
            return Err(refused(name, SourceFault::Unsupported, &why));
        }
        if let Some((unknown, _)) = options.settings.iter().find(|(key, _)| !knows(&scheme, key)) {
            let why = format!("it has no setting named {unknown}");
            return Err(refused(name, SourceFault::NotThatFormat, &why));
        }
        let mut settings: Vec<_> = CLIENT_DEFAULTS.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        if parsed.scheme() == "http" {
            // The caller said so.
            settings.push(("allow_http".into(), "true".into()));
        }
        settings.extend(environment(&scheme));
        settings.extend(options.settings.iter().cloned());
        if !matches!(scheme, ObjectStoreScheme::Local | ObjectStoreScheme::Memory) {
            // The process may have chosen one: then that is used.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let has_credentials =
            scheme != ObjectStoreScheme::AmazonS3 || settings.iter().any(|(key, _)| is_credential(key));
        let built = match scheme {
            ObjectStoreScheme::Http => http_store(&parsed, settings),
            _ => parse_url_opts(&parsed, settings).map(|(store, _)| store.into()),
        };
        let store = built.map_err(|error| opening(&name, &error))?;
        Self::open_named(name, store, path, options).map_err(|error| match error {
            Error::Source { name, fault: SourceFault::TimedOut | SourceFault::Io(_), why } if !has_credentials => {
                let why =
                    format!("no credentials are set (AWS_ACCESS_KEY_ID and others), and this machine has none: {why}");
                Error::Source { name, fault: SourceFault::Denied, why }
            }
            error => error,
        })
    }

    /// Opens an object of a store that the caller has built, whose settings are its own.
    ///
    /// # Errors
    ///
    /// As for [`open`](ObjectSource::open).
    pub fn open_in(store: Arc<dyn ObjectStore>, path: &Path, options: &ObjectOptions) -> Result<Self> {
        Self::open_named(format!("{path} in {store}"), store, path.clone(), options)
    }

    fn open_named(name: String, store: Arc<dyn ObjectStore>, path: Path, options: &ObjectOptions) -> Result<Self> {
        let granule_bytes = check_granule(options.granule_bytes)?;
        let work = Work::new(options.runtime.clone())?;
        let asked = (Arc::clone(&store), path.clone());
        let meta = work
            .run(options.deadline, async move { asked.0.get_opts(&asked.1, GetOptions::new().with_head(true)).await })
            .map_err(|error| Error::source_io(&name, &error))?
            .map_err(|error| opening(&name, &error))?
            .meta;
        let fault = |fault, why: &str| Error::Source { name: name.clone(), fault, why: why.into() };
        if meta.size == 0 {
            return Err(fault(SourceFault::Empty, "a page list maps at least one byte"));
        }
        let Some(version) = ObjectVersion::of(&meta) else {
            let why = "the store tells neither an etag nor a time: an object that is replaced could not be told";
            return Err(fault(SourceFault::Unsupported, why));
        };
        let object = Arc::new(Object { path, len_bytes: meta.size, version });
        Ok(Self { store, object, granule_bytes, deadline: options.deadline, work })
    }
}

impl PageSource for ObjectSource {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset_bytes, buf.len(), self.object.len_bytes)?;
        if buf.is_empty() {
            return Ok(());
        }
        let range = offset_bytes..offset_bytes + buf.len() as u64;
        let (store, object) = (Arc::clone(&self.store), Arc::clone(&self.object));
        let bytes = self.work.run(self.deadline, async move { get(&*store, &object, range).await })??;
        buf.copy_from_slice(&bytes);
        Ok(())
    }

    fn len_bytes(&self) -> Option<u64> {
        Some(self.object.len_bytes)
    }

    fn granule_bytes(&self) -> usize {
        self.granule_bytes
    }

    /// The path, the size, and the etag or time.
    fn identity(&self) -> Option<Vec<u8>> {
        let Object { path, len_bytes, version } = &*self.object;
        let version = match version {
            ObjectVersion::Etag(etag) => format!("etag {etag}"),
            ObjectVersion::Modified(time) => {
                let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                format!("modified {}.{:09}", since.as_secs(), since.subsec_nanos())
            }
        };
        Some(format!("object {path} {len_bytes} {version}").into_bytes())
    }
}

impl std::fmt::Debug for ObjectSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectSource")
            .field("store", &format_args!("{}", self.store))
            .field("object", &self.object)
            .field("granule_bytes", &self.granule_bytes)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// Reads exactly a range of exactly the object that was opened.
async fn get(store: &dyn ObjectStore, object: &Object, range: Range<u64>) -> io::Result<Vec<u8>> {
    let lies = |what: String| io::Error::new(ErrorKind::InvalidData, format!("the store answered {what}"));
    let condition = object.version.condition().with_range(Some(range.clone()));
    let answer = store.get_opts(&object.path, condition).await.map_err(|error| reading(&error))?;
    if answer.range != range {
        return Err(lies(format!("bytes {:?} when asked for {range:?}", answer.range)));
    }
    if answer.meta.size != object.len_bytes || ObjectVersion::of(&answer.meta).as_ref() != Some(&object.version) {
        return Err(replaced());
    }
    let len = (range.end - range.start) as usize;
    let (mut bytes, mut stream) = (Vec::with_capacity(len), answer.into_stream());
    while let Some(chunk) = stream.try_next().await.map_err(|error| reading(&error))? {
        // Not one byte more is kept.
        if bytes.len() + chunk.len() > len {
            return Err(lies(format!("more than the {len} bytes that it was asked for")));
        }
        bytes.extend_from_slice(&chunk);
    }
    if bytes.len() < len {
        let why = format!("the store answered {} of {len} bytes", bytes.len());
        return Err(io::Error::new(ErrorKind::UnexpectedEof, why));
    }
    Ok(bytes)
}

fn replaced() -> io::Error {
    io::Error::new(ErrorKind::StaleNetworkFileHandle, "the object was replaced since it was opened")
}

/// Tells an error with its causes, which the library's own words leave out.
fn told(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// Says what a read's error is.
fn reading(error: &object_store::Error) -> io::Error {
    match error {
        object_store::Error::Precondition { .. } => replaced(),
        object_store::Error::NotFound { .. } => io::Error::new(ErrorKind::NotFound, told(error)),
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            io::Error::new(ErrorKind::PermissionDenied, told(error))
        }
        _ => io::Error::other(told(error)),
    }
}

/// Says why an object can't be opened.
fn opening(name: &str, error: &object_store::Error) -> Error {
    use object_store::Error as Store;
    let fault = match error {
        Store::NotFound { .. } => SourceFault::NotFound,
        Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => SourceFault::Denied,
        Store::InvalidPath { .. } | Store::UnknownConfigurationKey { .. } => SourceFault::NotThatFormat,
        Store::NotSupported { .. } | Store::NotImplemented { .. } => SourceFault::Unsupported,
        _ => SourceFault::Io(nix::errno::Errno::EIO),
    };
    Error::Source { name: name.into(), fault, why: told(error) }
}

/// Names a URL in errors, without what may be a secret: a password and a signature; and the name of a user, unless it is
/// a container, as Azure has it.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Refused where there can be none.
    let _ = url.set_password(None);
    if matches!(url.scheme(), "http" | "https") {
        let _ = url.set_username("");
    }
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// Names what is no URL of a store: anything but the scheme may be a secret.
fn scheme_of(url: &str) -> String {
    match url.split_once(':') {
        Some((scheme, _)) if scheme.chars().all(|char| char.is_ascii_alphanumeric() || "+-.".contains(char)) => {
            format!("{scheme}:…")
        }
        _ => "the URL".into(),
    }
}

/// Builds the store of an HTTP server. A name and a password in the URL go into a header: the library would not send them, and
/// tell them in its errors.
fn http_store(url: &Url, settings: Vec<(String, String)>) -> object_store::Result<Arc<dyn ObjectStore>> {
    let mut client = ClientOptions::new();
    for (key, value) in settings {
        // Others were refused.
        if let Ok(key) = key.to_ascii_lowercase().parse() {
            client = client.with_config(key, value);
        }
    }
    if !url.username().is_empty() || url.password().is_some() {
        let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
        let secret = [decoded(url.username()), decoded(url.password().unwrap_or(""))].join(&b':');
        let mut value = HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(secret)))
            .expect("base64 is made of characters that a header may have");
        value.set_sensitive(true);
        client = client.with_default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
    }
    let origin = format!("{}://{}", url.scheme(), &url[Position::BeforeHost..Position::BeforePath]);
    Ok(Arc::new(HttpBuilder::new().with_url(origin).with_client_options(client).build()?))
}

/// The settings that the environment has for a store. Others of its variables are not the library's, whatever their names.
fn environment(scheme: &ObjectStoreScheme) -> Vec<(String, String)> {
    let prefix = match scheme {
        ObjectStoreScheme::AmazonS3 => "AWS_",
        ObjectStoreScheme::GoogleCloudStorage => "GOOGLE_",
        ObjectStoreScheme::MicrosoftAzure => "AZURE_",
        _ => return Vec::new(),
    };
    std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(key, _)| key.starts_with(prefix))
        .collect()
}

/// Tells whether a store has a setting of that name, which it would else pass over.
fn knows(scheme: &ObjectStoreScheme, key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    match scheme {
        ObjectStoreScheme::AmazonS3 => key.parse::<AmazonS3ConfigKey>().is_ok(),
        ObjectStoreScheme::GoogleCloudStorage => key.parse::<GoogleConfigKey>().is_ok(),
        ObjectStoreScheme::MicrosoftAzure => key.parse::<AzureConfigKey>().is_ok(),
        ObjectStoreScheme::Http => key.parse::<ClientConfigKey>().is_ok(),
        _ => false,
    }
}

/// Tells whether a setting of S3 is a way to credentials: without any, the machine's metadata service is asked for them.
fn is_credential(key: &str) -> bool {
    use AmazonS3ConfigKey as Key;
    matches!(
        key.to_ascii_lowercase().parse(),
        Ok(Key::AccessKeyId
            | Key::WebIdentityTokenFile
            | Key::ContainerCredentialsRelativeUri
            | Key::ContainerCredentialsFullUri
            | Key::SkipSignature)
    )
}

/// The runtime that requests run on. Callers are threads that wait.
enum Work {
    /// Taken when it is dropped.
    Own {
        runtime: Option<Runtime>,
        pid: u32,
    },
    Given {
        handle: Handle,
        pid: u32,
    },
}

impl Work {
    fn new(given: Option<Handle>) -> Result<Self> {
        let pid = std::process::id();
        if let Some(handle) = given {
            // Its one thread may be the one that waits.
            if handle.runtime_flavor() == RuntimeFlavor::CurrentThread {
                let rule = "it must have threads of its own: build it multi-threaded";
                return Err(Error::Invalid { what: "the number of threads of the runtime", value: 1, rule });
            }
            if Handle::try_current().is_ok_and(|current| current.id() == handle.id()) {
                let rule = "none may wait for it: open the object outside of that runtime";
                return Err(Error::Invalid { what: "the threads of the runtime that open the object", value: 1, rule });
            }
            return Ok(Work::Given { handle, pid });
        }
        // Its threads take no signal, as none of the library's does: they have the mask of the thread that starts them.
        let mask = SigSet::all()
            .thread_swap_mask(SigmaskHow::SIG_SETMASK)
            .map_err(Error::sys("pthread_sigmask around the start of a runtime"))?;
        let built = Builder::new_multi_thread().worker_threads(1).thread_name("kiomap-objects").enable_all().build();
        mask.thread_set_mask().map_err(Error::sys("pthread_sigmask around the start of a runtime"))?;
        let runtime = built.map_err(Error::io("starting the runtime of an object store"))?;
        Ok(Work::Own { runtime: Some(runtime), pid })
    }

    /// Runs a future on the runtime and waits for it, from any thread, one of a runtime too.
    fn run<T: Send + 'static>(
        &self,
        deadline: Duration,
        future: impl Future<Output = T> + Send + 'static,
    ) -> io::Result<T> {
        let (handle, pid) = match self {
            Work::Own { runtime, pid } => (runtime.as_ref().expect("taken only by drop").handle(), pid),
            Work::Given { handle, pid } => (handle, pid),
        };
        if *pid != std::process::id() {
            return Err(io::Error::other("a forked process has no thread that could ask the object store"));
        }
        let (done, outcome) = sync_channel(1);
        // Nobody may wait any more.
        let task = handle.spawn(async move { drop(done.send(future.await)) });
        outcome.recv_timeout(deadline).map_err(|why| match why {
            RecvTimeoutError::Timeout => {
                task.abort();
                io::Error::new(ErrorKind::TimedOut, format!("the object store did not answer within {deadline:?}"))
            }
            RecvTimeoutError::Disconnected => {
                io::Error::other("the request was given up: the runtime was shut down, or the store panicked")
            }
        })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Work::Own { runtime, pid } = self
            && let Some(runtime) = runtime.take()
        {
            if *pid == std::process::id() {
                // Waits for nobody: a request may be stalled, and this may be a thread of a runtime.
                runtime.shutdown_background();
            } else {
                // Its threads are the parent's, and so are its locks.
                std::mem::forget(runtime);
            }
        }
    }
}
