package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
)

// controlSuffix makes the control socket's path of the vhost-user socket's.
const controlSuffix = ".ctl"

// noBalloonUsage: what is registered goes on to be the page that it was, when a balloon, free page reporting or virtio-mem has taken that page
// from the guest and given it another.
const noBalloonUsage = "promise that the VM has no balloon, free page reporting or virtio-mem: guest memory is registered with the kernel once, not for each frame; " +
	"with one of them, wrong bytes would be sent"

// controlNone is the --control that asks for no control socket.
const controlNone = "none"

// flags of vhostd run, as they were given.
type flags struct {
	socketPath, socketGroup string
	socketMode, socketOwner string
	allowUID, allowGID      []string
	user                    string
	noSandbox               bool
	client                  bool
	fd                      int
	printCapabilities       bool
	net                     string
	hostfwd                 []string
	mac                     string
	mtu, queues             int
	poll                    time.Duration
	workers                 string
	zerocopy                string
	noBalloon               bool
	disable                 string
	control, metrics        string
	pprof                   bool
	logFormat, logLevel     string
}

func (f *flags) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.socketPath, "socket-path", "", "`path` of the vhost-user socket")
	fs.IntVar(&f.fd, "fd", -1, "`number` of an inherited descriptor instead: a socket that listens or is connected")
	fs.BoolVar(&f.client, "client", false, "connect to --socket-path, where the VMM listens, instead of listening")
	fs.StringVar(&f.socketMode, "socket-mode", "", "permissions of the socket, in octal (default 0600, 0660 with --socket-group)")
	fs.StringVar(&f.socketGroup, "socket-group", "", "`group` of the socket, by name or number")
	fs.StringVar(&f.socketOwner, "socket-owner", "", "`user` whom the socket belongs to, by name or number (default: who runs vhostd, --user)")
	fs.StringSliceVar(&f.allowUID, "allow-uid", nil, "serve processes of these `users` alone, by name or number; the control socket also takes root and vhostd's own")
	fs.StringSliceVar(&f.allowGID, "allow-gid", nil, "serve processes in these `groups`, by name or number, beside those of --allow-uid")
	fs.BoolVar(&f.printCapabilities, "print-capabilities", false, "print what this back-end is, as JSON, and exit")

	fs.StringVar(&f.net, "net", "user", "`network` of the guest: "+kindNames()+", see above")
	fs.StringArrayVar(&f.hostfwd, "hostfwd", nil, hostfwdUsage)
	fs.StringVar(&f.mac, "mac", "", "MAC `address` to offer to the guest (default: the VMM chooses)")
	fs.IntVar(&f.mtu, "mtu", 0, "MTU in `bytes` to offer to the guest; a tap gets it as well (default: the device's)")
	fs.IntVar(&f.queues, "queues", 0, "queue pairs to offer, `N` (default: 1, or what --net says)")
	fs.DurationVar(&f.poll, "poll", backend.DefaultPoll, "longest busy wait before sleeping; tunes itself below that; 0 for none")
	fs.StringVar(&f.workers, "workers", "queue", "threads: one for each queue, or one for both of a pair (queue or pair); pair answers and sleeps with fewer wake-ups")
	fs.StringVar(&f.zerocopy, "zerocopy", "auto", "send from the guest's own pages: auto (large frames, where it pays), on (all that --net can) or off")
	fs.BoolVar(&f.noBalloon, "no-balloon", false, noBalloonUsage)
	fs.StringVar(&f.disable, "disable-features", "", "virtio features not to offer, a `list` like MRG_RXBUF,EVENT_IDX")

	fs.StringVar(&f.control, "control", "", "`path` of the control socket, or none (default: --socket-path with "+controlSuffix+" added)")
	fs.StringVar(&f.metrics, "metrics", "", "`address` to serve Prometheus metrics on, like 127.0.0.1:9100")
	fs.BoolVar(&f.pprof, "pprof", false, "serve Go's profiles at the --metrics address, too")
	fs.StringVar(&f.user, "user", "", "`NAME|UID[:GROUP]` to become once everything is open; vhostd must be started as root for it")
	fs.BoolVar(&f.noSandbox, "no-sandbox", false, "keep all rights: no Landlock, seccomp filter or dropping of capabilities once everything is open")
	fs.StringVar(&f.logFormat, "log-format", "text", "text or json")
	fs.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
}

// settings are flags that have been understood.
type settings struct {
	flags
	mode     uint32 // of the socket
	owner    int    // of the socket; -1: leave it
	group    int    // of the socket; -1: leave it
	allowed  sys.Allowed
	become   *confine.User // nil: stay
	mac      [6]byte
	disable  virtio.Features
	policy   netdev.Policy // of sending from the guest's pages
	level    slog.Level
	dash     string // what stands before an option's name: "--", or nothing in a configuration file
	inherits bool   // descriptors of whoever started this process are for this guest
	left     func() // called when a guest has left; nil: nobody cares
}

// fault is what is wrong about one option, by its name without dashes.
type fault struct {
	option string
	err    error
}

func (e *fault) Error() string { return e.err.Error() }
func (e *fault) Unwrap() error { return e.err }

// word is an option's name where the user has written it.
func (s settings) word(option string) string { return s.dash + option }

// faultf is fmt.Errorf for a fault. The option's name comes first on a command line; of a file, it is told with the line.
func (s settings) faultf(option, format string, args ...any) *fault {
	if s.dash != "" {
		format = s.dash + option + " " + format
	}
	return &fault{option, fmt.Errorf(format, args...)}
}

// settle understands the flags. All its errors are usage errors.
func (f flags) settle(given func(name string) bool) (settings, error) {
	s := settings{flags: f, dash: "--", inherits: true}
	if given("fd") && (f.socketPath != "" || f.client) {
		return s, usagef("--fd excludes --socket-path and --client: the descriptor is the connection")
	}
	if f.client && f.socketPath == "" {
		return s, usagef("--client needs --socket-path: where the VMM listens")
	}
	if given("fd") && f.fd < 0 {
		return s, usagef("--fd %d: want the number of an inherited descriptor", f.fd)
	}
	if f.socketPath == "" && f.socketMode+f.socketGroup+f.socketOwner != "" {
		return s, usagef("--socket-mode, --socket-group and --socket-owner are for a socket that vhostd makes: one that is inherited stays as it is")
	}
	if f.pprof && f.metrics == "" {
		return s, usagef("--pprof needs --metrics: the address to serve on")
	}
	if f.queues < 0 || given("queues") && f.queues == 0 {
		return s, usagef("--queues %d: want at least 1", f.queues)
	}
	if f.poll < 0 {
		return s, usagef("--poll %v: want 0 or more", f.poll)
	}
	if f.workers != "queue" && f.workers != "pair" {
		return s, usagef("--workers %q: want queue or pair", f.workers)
	}
	if f.logFormat != "text" && f.logFormat != "json" {
		return s, usagef("--log-format %q: want text or json", f.logFormat)
	}
	if err := s.parse(); err != nil {
		return s, &usageError{err}
	}
	return s, nil
}

// parse understands what the flags alone do not tell. Its error is all faults, joined.
func (s *settings) parse() error {
	var errs [6]error
	if s.level.UnmarshalText([]byte(s.logLevel)) != nil {
		errs[0] = s.faultf("log-level", "%q: want debug, info, warn or error", s.logLevel)
	}
	var err error
	if s.policy, err = netdev.ParsePolicy(s.flags.zerocopy); err != nil {
		errs[1] = s.faultf("zerocopy", "%w", err)
	}
	errs[2] = s.parseMAC()
	errs[3] = s.parseFeatures()
	errs[4] = s.parseOwner()
	errs[5] = s.parseUsers()
	return errors.Join(errs[:]...)
}

func (s *settings) parseOwner() error {
	s.mode, s.owner, s.group = 0o600, -1, -1
	if s.client && (s.socketGroup != "" || s.socketMode != "" || s.socketOwner != "") {
		return s.faultf("client", "excludes %s, %s and %s: the socket is the VMM's", s.word("socket-mode"), s.word("socket-group"), s.word("socket-owner"))
	}
	if s.socketOwner != "" {
		uid, err := lookupUID(s.socketOwner)
		if err != nil {
			return s.faultf("socket-owner", "%w", err)
		}
		s.owner = uid
	}
	if s.socketGroup != "" {
		gid, err := confine.LookupGroup(s.socketGroup)
		if err != nil {
			return s.faultf("socket-group", "%w", err)
		}
		s.group, s.mode = gid, 0o660
	}
	if s.socketMode == "" {
		return nil
	}
	mode, err := strconv.ParseUint(s.socketMode, 8, 32)
	if err != nil || mode == 0 || mode > 0o777 {
		return s.faultf("socket-mode", "%q: want permissions in octal, like 0660", s.socketMode)
	}
	s.mode = uint32(mode)
	return nil
}

// lookupUID reads a user's name or number. A group behind it, as chown(1) takes one, would be a wish that is not granted.
func lookupUID(name string) (int, error) {
	if strings.Contains(name, ":") {
		return 0, fmt.Errorf("%q: want a user alone; a group has an option of its own", name)
	}
	u, err := confine.LookupUser(name)
	if err != nil {
		return 0, err
	}
	return u.UID, nil
}

// parseUsers understands who may connect, and whom vhostd is to become.
func (s *settings) parseUsers() (err error) {
	for _, name := range s.allowUID {
		uid, err := lookupUID(name)
		if err != nil {
			return s.faultf("allow-uid", "%w", err)
		}
		s.allowed.UIDs = append(s.allowed.UIDs, uid)
	}
	for _, name := range s.allowGID {
		gid, err := confine.LookupGroup(name)
		if err != nil {
			return s.faultf("allow-gid", "%w", err)
		}
		s.allowed.GIDs = append(s.allowed.GIDs, gid)
	}
	if s.user == "" {
		return nil
	}
	if s.noSandbox {
		return s.faultf("no-sandbox", "excludes %s: start vhostd as that user", s.word("user"))
	}
	if s.become, err = confine.LookupUser(s.user); err != nil {
		return s.faultf("user", "%w", err)
	}
	return nil
}

func (s *settings) parseMAC() error {
	text := s.flags.mac
	if text == "" {
		return nil
	}
	a, err := net.ParseMAC(text)
	switch {
	case err != nil || len(a) != len(s.mac):
		return s.faultf("mac", "%q: want an address like 52:54:00:12:34:56", text)
	case a[0]&1 != 0:
		return s.faultf("mac", "%q is a multicast address: its first byte must be even", text)
	}
	if copy(s.mac[:], a); s.mac == [6]byte{} {
		return s.faultf("mac", "%q: all zero is no address", text)
	}
	return nil
}

// parseFeatures reads a comma list of feature names as virtio.Features prints them, with or without the specification's prefixes.
func (s *settings) parseFeatures() error {
	for name := range strings.SplitSeq(s.flags.disable, ",") {
		name = strings.ToUpper(strings.TrimSpace(name))
		for _, prefix := range []string{"VIRTIO_NET_F_", "VIRTIO_F_", "VIRTIO_RING_F_"} {
			name = strings.TrimPrefix(name, prefix)
		}
		if name == "" {
			continue
		}
		f, ok := offerable()[name]
		if !ok {
			return s.faultf("disable-features", "has the unknown feature %q", name)
		}
		s.disable |= f
	}
	return nil
}

// offerable are the features that have a name and belong to the guest; FProtocolFeatures belongs to the front-end.
func offerable() map[string]virtio.Features {
	m := map[string]virtio.Features{}
	for bit := range 64 {
		f := virtio.Features(1) << bit
		if name := f.String(); !strings.HasPrefix(name, "bit ") && f != virtio.FProtocolFeatures {
			m[name] = f
		}
	}
	return m
}
