package main

import (
	"log/slog"
	"os"
	"path/filepath"

	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
)

// confine takes from this process what its port, its sockets and its log do not need, unless it is not to.
func (s settings) confine(p *port, log *slog.Logger) error {
	if s.noSandbox {
		log.Warn("not confined: whoever finds a fault in vhostd has all that this user has")
		return nil
	}
	n := daemonNeeds(s, p.src.path)
	n.Add(deviceNeeds(p.dev, s.become))
	n.Add(sourceNeeds(s))
	r, err := confine.Apply(n)
	if err != nil {
		return err
	}
	logConfined(log, r)
	return nil
}

// logConfined says what was done. What only few kernels can do is no warning: there is nothing that an administrator could see to.
func logConfined(log *slog.Logger, r confine.Report) {
	for _, what := range r.Missing {
		log.Warn("confined as far as this host can: there is no " + what)
	}
	for _, what := range r.Newer {
		log.Info("a newer kernel confines further: here there is no " + what)
	}
	log.Info("confined", "landlock", r.Landlock, "seccomp", r.Seccomp, "capabilities", r.Caps.String(), "uid", os.Getuid(), "gid", os.Getgid())
}

// daemonNeeds are those of everything around a port: the control socket, metrics, the service manager. socket is the vhost-user socket's path.
func daemonNeeds(s settings, socket string) (n confine.Needs) {
	n.User = s.become
	if path := s.controlPath(socket); path != "" {
		n.Remove = append(n.Remove, filepath.Dir(path))
	}
	if manager := os.Getenv("NOTIFY_SOCKET"); manager != "" {
		n.Use |= confine.Unix
		n.Connect = append(n.Connect, manager)
	}
	if s.metrics != "" {
		n.Use |= confine.Metrics
	}
	if s.pprof {
		n.Use |= confine.Profile
	}
	return n
}

// sourceNeeds are those of the place that front-ends come from.
func sourceNeeds(s settings) (n confine.Needs) {
	switch {
	case s.client:
		n.Use, n.Connect = confine.Unix, []string{s.socketPath}
	case s.socketPath != "":
		n.Remove = []string{filepath.Dir(s.socketPath)}
	}
	return n
}

// deviceNeeds are those of an open device, for a process that is to become somebody, if become is not nil.
func deviceNeeds(dev netdev.Device, become *confine.User) confine.Needs {
	caps := dev.Capabilities()
	switch caps.Kind {
	case "user":
		return confine.Needs{Use: confine.Inet, Read: nameFiles(become)}
	case "tap":
		return confine.Needs{Use: confine.Ring}
	case "packet": // an interface that goes down is waited for
		n := confine.Needs{Use: confine.Packet}
		if caps.MaxPairs > 1 { // a pair that is not in use has no socket
			n.Caps = confine.CapNetRaw
		}
		return n
	case "xdp": // sockets are made anew when memory changes, and after errors
		return confine.Needs{Use: confine.XDP, Caps: confine.CapNetRaw | confine.CapBPF | confine.CapIPCLock}
	case "vxlan", "geneve", "dgram": // pages in flight are locked
		return confine.Needs{Use: confine.Ring, Caps: confine.CapIPCLock}
	}
	return confine.Needs{}
}

// nameFiles are what --net user reads again when it changes. Such a file is mostly replaced by another one of the same name, for which a rule for the
// file does not count: so there is one for its directory. Where that is /etc, only an ordinary user gets it, who can read there what all
// can; to root belong files that nobody else can read. As root, vhostd goes on with what the replaced file said.
func nameFiles(become *confine.User) (paths []string) {
	root := os.Geteuid() == 0
	if become != nil {
		root = become.UID == 0
	}
	for _, path := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		paths = append(paths, path)
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			continue
		}
		if dir := filepath.Dir(real); dir != "/etc" || !root {
			paths = append(paths, dir)
		}
	}
	return paths
}

// mayControl is who may use the control socket: those who may connect at all, root and vhostd's own user.
func (s settings) mayControl() func(sys.Peer) error {
	if len(s.allowed.UIDs)+len(s.allowed.GIDs) == 0 {
		return nil
	}
	a := s.allowed
	a.UIDs = append(append([]int{0, os.Geteuid()}, a.UIDs...), s.becomes()...)
	return a.Admit
}

// becomes is the user whom vhostd becomes, none if it stays.
func (s settings) becomes() []int {
	if s.become == nil {
		return nil
	}
	return []int{s.become.UID}
}
